"""The metric that a task is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Headline(NamedTuple):
    """The metric that a task is judged by, and its direction.

    Attributes:
        metric: name of the metric, `accuracy` for example.
        higher_is_better: whether a higher value is better.
    """

    metric: str
    higher_is_better: bool

    def __str__(self) -> str:
        """For a table, with an arrow to the better side: `accuracy ↑`."""
        return f"{self.metric} {'↑' if self.higher_is_better else '↓'}"

    @property
    def in_words(self) -> str:
        """For an axis: `accuracy (higher is better)`."""
        return f"{self.metric} ({'higher' if self.higher_is_better else 'lower'} is better)"

    def score(self, metrics: Mapping[str, float]) -> float:
        """The metric, or 1 minus it where lower is better: higher is always better.

        Normalised pixels have a variance of about 1, so that 1 - squared error reads as the share of it that is explained.
        """
        value = metrics[self.metric]
        return value if self.higher_is_better else 1 - value

    def ahead(self, ours: float, theirs: float) -> float:
        """By how much the first value is better than the second; negative where it is worse."""
        return ours - theirs if self.higher_is_better else theirs - ours

    def best(self, values: Sequence[float | None]) -> float | None:
        """The best of some values; None where there are none, or no two that differ."""
        known = {value for value in values if value is not None}
        return (max if self.higher_is_better else min)(known) if len(known) > 1 else None
