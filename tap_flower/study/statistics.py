"""Means over seeds with their intervals, paired differences, corrected p-values, ranks; and these as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log2, sqrt
from statistics import fmean, stdev

from scipy.stats import linregress, rankdata, t

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

    @property
    def p(self) -> float | None:
        """The two-sided p-value of Student's t-test that the mean is zero; None where there is one value only."""
        if self.half is None:
            return None
        if self.half == 0.0:
            return float(self.mean == 0.0)
        quantile = float(t.ppf((1 + LEVEL) / 2, self.count - 1))
        return 2 * float(t.sf(abs(self.mean) / self.half * quantile, self.count - 1))


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value or more, with its 95 % interval."""
    n = len(values)
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * stdev(values) / sqrt(n) if n > 1 else None
    return Estimate(fmean(values), half, n)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """The mean of `value - reference` over the seeds that both have; None where there is no such seed."""
    differences = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    return estimate(differences) if differences else None


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm-corrected p-values: they bound the probability of rejecting any true hypothesis by the level.

    The step-down procedure of Holm (Scandinavian Journal of Statistics 6, 1979): the i-th smallest of m, counted from 1, is
    multiplied by m + 1 − i, and is at least as large as those before it, and at most 1.

    Args:
        p_values: name of a comparison -> its p-value.
    """
    corrected, largest = dict[str, float](), 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda one: one[1])):
        largest = max(largest, min((len(p_values) - place) * p, 1.0))
        corrected[name] = largest
    return corrected


def slope_by_doubling(values: Mapping[float, float]) -> float:
    """The least-squares slope of values over log₂ x: what each doubling of x adds.

    Args:
        values: x > 0 -> value, for two x or more.
    """
    return float(linregress([log2(x) for x in values], list(values.values())).slope)


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
