"""Means over seeds with their intervals, paired differences, ranks; and these as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from scipy.stats import rankdata, t

LEVEL = 0.95
"""Level of the intervals."""
ESTIMATE_COLUMNS = ("mean", "half_interval_95", "seeds")
"""Names of an estimate's values in CSV."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: mean of the values.
        half: half the width of the 95 % interval, `t(n - 1) · s / √n` (Student); None where there is one value only.
        count: number of values, n.
    """

    mean: float
    half: float | None
    count: int

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value or more, with its 95 % interval."""
    n = len(values)
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * stdev(values) / sqrt(n) if n > 1 else None
    return Estimate(fmean(values), half, n)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """The mean of `value - reference` over the seeds that both have; None where there is no such seed."""
    differences = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    return estimate(differences) if differences else None


def mean_ranks(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Label -> its mean rank over several comparisons; 1 is the best, and those that are equal share their ranks' mean.

    Args:
        scores: label -> score of each comparison; higher is better. Comparisons that lack a label are left out.
    """
    labels = sorted({label for one in scores for label in one})
    complete = [one for one in scores if len(one) == len(labels)]
    ranks = [rankdata([-one[label] for label in labels]) for one in complete]
    return {label: fmean(float(rank[i]) for rank in ranks) for i, label in enumerate(labels)} if ranks else {}


def csv_text(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table as CSV; None becomes an empty cell."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *lines])
    return out.getvalue()
