"""Per-FedAvg (Fallah et al., NeurIPS 2020, arXiv 2002.07948): a server's model that is good to fine-tune from.

The client's objective is `F(w − α·∇F(w))`, the loss after one step of adaptation. Its first-order variant follows
`∇F(θ; D')` at `θ = w − α·∇F(w; D)`, with two sets D and D' of mini-batches. Both gradients count as a step of the
participation, so that every method sees as many mini-batches; w moves in every other step.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from tap_flower.core.components import State
from tap_flower.methods.method import Memory, Method, Participation, finetunes
from tap_flower.methods.session import Session

NAME = "per-fedavg"


class LookAhead:
    """The update of `core.training.train`: a plain gradient step to θ, then the optimiser's from w by θ's gradient.

    The last one of an odd number of steps does not look ahead.

    Args:
        parameters: of the model, w and θ in turn.
        rate: α.
        steps: of the participation.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], rate: float, steps: int) -> None:
        self.parameters, self.rate, self.steps = parameters, rate, steps
        self.w: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, number: int, optimizer: Optimizer) -> None:
        """Makes the step numbered `number`, from 0."""
        if number % 2 == 0 and number + 1 < self.steps:
            self.w = [parameter.clone() for parameter in self.parameters]
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=self.rate)
            return
        for parameter, value in zip(self.parameters, self.w, strict=False):  # nothing where it did not look ahead
            parameter.copy_(value)
        self.w = []
        optimizer.step()


def participate(session: Session, server_round: int, received: State, memory: Memory) -> Participation:
    """Trains the server's copy for the loss after a step."""
    del memory
    rate, steps = session.settings.baselines.per_fedavg_rate, session.settings.train.steps
    returned, losses = session.train_round(
        server_round,
        received,
        "server",
        update=lambda model: LookAhead([p for p in model.parameters() if p.requires_grad], rate, steps),
    )
    return Participation(returned, losses)


OWN_LOOP = "looks ahead in every other optimiser step, which is the loop's own"
METHOD = Method(NAME, participate, finetunes(NAME), (NAME,), own_loop=OWN_LOOP)
