"""pFedMe (Dinh et al., NeurIPS 2020, arXiv 2006.08848): personal models through Moreau envelopes.

The client's objective is the envelope `min over θ of F(θ) + λ/2 · ||θ − w||²`. Algorithm 1 solves for θ approximately,
in `pfedme_inner_steps` optimiser steps that go on from the θ before, and follows the envelope's gradient:
`w ← w − η·λ·(w − θ)`. w is returned (β = 1 on the server), θ is the personal model.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from tap_flower.core.components import ComponentModel, State, trainable_state
from tap_flower.methods.method import Memory, Method, Participation, SecondStage
from tap_flower.methods.session import Session

NAME = "pfedme"


class Envelope:
    """The update of `core.training.train`: a step of θ, and after every K of them and the last one a step of w.

    Args:
        w: tensor name -> value, changed in place.
        theta: tensor name -> parameter, which the optimiser changes.
        rate: η·λ.
        inner_steps: K.
        steps: of the participation.
    """

    def __init__(self, w: State, theta: State, rate: float, inner_steps: int, steps: int) -> None:
        self.w, self.theta, self.rate, self.inner_steps, self.steps = w, theta, rate, inner_steps, steps

    @torch.no_grad()
    def __call__(self, number: int, optimizer: Optimizer) -> None:
        """Makes the step numbered `number`, from 0."""
        optimizer.step()
        if (number + 1) % self.inner_steps == 0 or number + 1 == self.steps:
            for name, value in self.w.items():
                value -= self.rate * (value - self.theta[name])


def participate(session: Session, server_round: int, received: State, memory: Memory) -> Participation:
    """R optimiser steps of θ, which starts at w_t; w follows."""
    del memory
    settings = session.settings.baselines
    w = {name: value.to(session.device, copy=True) for name, value in received.items()}

    def follow(model: ComponentModel) -> Envelope:
        rate, steps = settings.pfedme_rate * settings.pfedme_lambda, session.settings.train.steps
        return Envelope(w, trainable_state(model), rate, settings.pfedme_inner_steps, steps)

    penalty = session.near(w, settings.pfedme_lambda)
    _, losses = session.train_round(server_round, received, "server", penalty, follow)
    return Participation({name: value.cpu() for name, value in w.items()}, losses)


def second_stage(session: Session, received: State, memory: Memory) -> SecondStage:
    """Solves for the personal model θ of the last w, in the K optimiser steps of stage 2."""
    del memory
    theta, losses = session.finetune(
        received, "server", session.near(received, session.settings.baselines.pfedme_lambda)
    )
    return SecondStage({NAME: theta}, losses)


OWN_LOOP = "moves the server's copy between optimiser steps, which are the loop's own"
METHOD = Method(NAME, participate, second_stage, (NAME,), own_loop=OWN_LOOP)
