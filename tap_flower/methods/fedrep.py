"""FedRep (Collins et al., ICML 2021, arXiv 2102.07078): a client trains its own head first, then the shared base.

Of a participation's steps, the first minimise `F(φ, h)` over the heads h, and the others over the base φ, each while the
other part stands still; φ alone is exchanged. Nine steps in ten are the heads'; the paper's clients make ten passes over
their data for the heads and one for the base. FedAlt (Pillutla et al., ICML 2022, arXiv 2204.03809), with heads as the
personal parameters, is this method with as many steps for the one as for the other, `baselines.fedrep_head_share=0.5`. As
in both papers, the heads alone are fine-tuned for the last base.

The gradient is clipped over both parts together.
"""

from __future__ import annotations

from functools import partial

from torch.optim import Optimizer

from tap_flower.core.components import ComponentModel, State
from tap_flower.methods.fedper import check_heads, is_base, models, train_whole, whole
from tap_flower.methods.method import Memory, Method, Participation, SecondStage
from tap_flower.methods.session import Session

NAME = "fedrep"


class HeadsFirst:
    """The update of `core.training.train`: the optimiser's step of the heads alone, from some step on of the base alone.

    Args:
        model: that is trained.
        until: steps of the heads.
    """

    def __init__(self, model: ComponentModel, until: int) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.heads = [p for n, p in named if n in model.component_map.heads]
        self.base = [p for n, p in named if n not in model.component_map.heads]
        self.until = until

    def __call__(self, number: int, optimizer: Optimizer) -> None:
        """Makes the step numbered `number`, from 0."""
        for parameter in self.base if number < self.until else self.heads:
            parameter.grad = None  # AdamW leaves it alone
        optimizer.step()


def head_steps(steps: int, share: float) -> int:
    """Steps of the heads: that share of all, but one at least, and one at least is left for the base."""
    return min(max(round(share * steps), 1), steps - 1)


def participate(session: Session, server_round: int, received: State, memory: Memory) -> Participation:
    """Trains the heads, then the base, which is returned. A single step moves both."""
    steps = session.settings.train.steps
    until = head_steps(steps, session.settings.baselines.fedrep_head_share)
    update = None if steps == 1 else partial(HeadsFirst, until=until)
    return train_whole(session, server_round, received, memory, update)


def second_stage(session: Session, received: State, memory: Memory) -> SecondStage:
    """Fine-tunes the heads for the last base."""
    start, steps = whole(received, memory, session.initial_values), session.settings.distill.iterations
    finetuned, losses = session.finetune(start, "server", update=partial(HeadsFirst, until=steps))
    return SecondStage({NAME: finetuned}, losses)


OWN_LOOP = "moves heads and base in turn between optimiser steps, which are the loop's own"
METHOD = Method(
    NAME, participate, second_stage, (NAME,), models, is_base, partial(check_heads, NAME), own_loop=OWN_LOOP
)
