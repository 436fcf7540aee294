"""Stage 1's adaptive replacement: where the server's components beat the personal ones by a margin, take them over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from tap_flower.core.components import ComponentMap, Pair, load_trainable_state


@dataclass(frozen=True)
class Decision:
    """Whether the components of one pair are replaced, and why.

    Attributes:
        pair: the modality-task pair.
        teacher_loss: loss of the server's copy.
        personal_loss: loss of the personal model; infinity before its first participation.
        margin: by how much the server's copy must be better.
    """

    pair: Pair
    teacher_loss: float
    personal_loss: float
    margin: float

    @property
    def replaced(self) -> bool:
        """TAP's rule: `teacher_loss + margin < personal_loss`."""
        return self.teacher_loss + self.margin < self.personal_loss


def decide(
    component_map: ComponentMap,
    teacher_loss: Mapping[str, float],
    personal_loss: Mapping[str, float],
    margins: Mapping[str, float],
) -> list[Decision]:
    """One decision per pair that the teacher has a loss for.

    All decisions are made before anything is copied, so that they do not depend on the order of the pairs. A loss that is
    not finite counts as infinity: a broken personal model is replaced, and a broken server's copy replaces nothing.

    Args:
        component_map: of the client's model.
        teacher_loss: task name -> loss of the server's copy in this participation.
        personal_loss: task name -> loss of the personal model; a missing task counts as infinity.
        margins: task name -> margin, at least 0.
    """
    return [
        Decision(pair, _or_infinity(teacher_loss[task]), _or_infinity(personal_loss.get(task)), margins[task])
        for task, pair in sorted(component_map.pair_of_task.items())
        if task in teacher_loss
    ]


def _or_infinity(loss: float | None) -> float:
    return loss if loss is not None and math.isfinite(loss) else math.inf


def replace(
    personal: nn.Module, source: Mapping[str, Tensor], component_map: ComponentMap, decisions: list[Decision]
) -> set[str]:
    """Copies, for every replaced pair, exactly the tensors that its forward pass reaches from `source`.

    Args:
        personal: the personal model, changed in place.
        source: tensor name -> value of the server's copy, trained or as received.
        component_map: of the client's model.
        decisions: from `decide`.

    Returns:
        The names of the tensors that were copied.
    """
    names = {name for d in decisions if d.replaced for name in component_map.tensors_of(d.pair)}
    load_trainable_state(personal, source, names)
    return names
