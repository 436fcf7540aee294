"""Stage 1's adaptive replacement: where the server's components beat the personal ones by a margin, take them over.

A pair's components may be taken over in part: `personal + α (server − personal)`. TAP as published knows α = 0 and α = 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tap_flower.core.components import ComponentMap, Pair, State, load_trainable_state, trainable_state

PARTS = (0.25, 0.5, 0.75)
"""The α between 0 and 1 that are tried."""


@dataclass(frozen=True)
class Decision:
    """How far the components of one pair are replaced, and why.

    Attributes:
        pair: the modality-task pair.
        teacher_loss: loss of the server's copy.
        personal_loss: loss of the personal model; infinity before its first participation.
        margin: by how much the server's copy, or a mixture with it, must be better.
        share: α; 0 keeps the personal components, 1 replaces them.
    """

    pair: Pair
    teacher_loss: float
    personal_loss: float
    margin: float
    share: float

    @property
    def replaced(self) -> bool:
        """Whether the personal components change."""
        return self.share > 0


def decide(
    component_map: ComponentMap,
    teacher_loss: Mapping[str, float],
    personal_loss: Mapping[str, float],
    margins: Mapping[str, float],
    mixed_loss: Mapping[float, Mapping[str, float]] | None = None,
) -> list[Decision]:
    """One decision per pair that the teacher has a loss for: the α with the lowest loss, if `loss + margin < personal_loss`.

    Without mixtures this is TAP's rule, `teacher_loss + margin < personal_loss`. All decisions are made before anything is
    copied, so that they do not depend on the order of the pairs. A loss that is not finite counts as infinity: a broken
    personal model is replaced, and a broken server's copy replaces nothing.

    Args:
        component_map: of the client's model.
        teacher_loss: task name -> loss of the server's copy in this participation.
        personal_loss: task name -> loss of the personal model; a missing task counts as infinity.
        margins: task name -> margin, at least 0.
        mixed_loss: α -> task name -> loss of the mixture.
    """
    decisions = list[Decision]()
    for task, pair in sorted(component_map.pair_of_task.items()):
        if task in teacher_loss:
            losses = {1.0: _or_infinity(teacher_loss[task])}
            losses |= {share: _or_infinity(loss.get(task)) for share, loss in (mixed_loss or {}).items()}
            best = min(losses, key=lambda share: losses[share])  # of equal ones the server's copy, which comes first
            personal = _or_infinity(personal_loss.get(task))
            share = best if losses[best] + margins[task] < personal else 0.0
            decisions.append(Decision(pair, losses[1.0], personal, margins[task], share))
    return decisions


def _or_infinity(loss: float | None) -> float:
    return loss if loss is not None and math.isfinite(loss) else math.inf


def mixture(personal: Mapping[str, Tensor], source: Mapping[str, Tensor], share: float) -> State:
    """`personal + share · (source − personal)`, tensor by tensor.

    Args:
        personal: tensor name -> value, on the CPU.
        source: tensor name -> value, on the CPU; it has all names of `personal`.
        share: α.
    """
    return {name: value.lerp(source[name], share) for name, value in personal.items()}


def replace(
    personal: nn.Module, source: Mapping[str, Tensor], component_map: ComponentMap, decisions: Sequence[Decision]
) -> set[str]:
    """Takes over, for every replaced pair, exactly the tensors that its forward pass reaches from `source`.

    A tensor that several pairs reach is taken over with the largest of their shares.

    Args:
        personal: the personal model, changed in place.
        source: tensor name -> value of the server's copy, trained or as received.
        component_map: of the client's model.
        decisions: from `decide`.

    Returns:
        The names of the tensors that were taken over.
    """
    shares = dict[str, float]()
    for decision in decisions:
        for name in component_map.tensors_of(decision.pair) if decision.replaced else ():
            shares[name] = max(decision.share, shares.get(name, 0.0))
    mine = {name: value.float() for name, value in trainable_state(personal).items()}  # a count has whole numbers
    taken = {
        name: source[name] if share == 1 else mine[name].lerp(source[name].to(mine[name]), share)
        for name, share in shares.items()
    }
    load_trainable_state(personal, taken, taken.keys())
    return set(taken)
