"""Early stopping: the round with the best mean validation score of the clients' own models, and when to stop waiting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean


@dataclass
class Validation:
    """The clients' validation scores so far. A task's score is its headline metric, or 1 minus it where lower is better.

    Attributes:
        latest: client -> mean score over its tasks at its last participation.
        best_round: the round after which the mean over all these clients was best; 0 before the first.
        best_score: that mean.
    """

    latest: dict[str, float] = field(default_factory=dict)
    best_round: int = 0
    best_score: float = 0.0

    def take(self, server_round: int, scores: Mapping[str, Mapping[str, float]]) -> float:
        """Takes the scores of a complete round.

        Args:
            server_round: counted from 1.
            scores: client -> task -> score, of the clients that took part.

        Returns:
            The mean over all clients that have a score. A client's first score also changes the mean, so a round with a new
            client cannot be compared with earlier rounds and counts as the best.
        """
        before = len(self.latest)
        self.latest |= {client: fmean(by_task.values()) for client, by_task in scores.items() if by_task}
        mean = fmean(self.latest.values()) if self.latest else 0.0
        if len(self.latest) > before or mean > self.best_score or not self.best_round:
            self.best_round, self.best_score = server_round, mean
        return mean

    def waited(self, server_round: int) -> int:
        """Rounds since the best one."""
        return server_round - self.best_round
