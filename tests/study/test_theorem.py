"""The study of pairs on linear maps: what it measures, by hand, and in federations of two pairs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from tap_flower.study import theorem
from tap_flower.study.studies import Values
from tap_flower.study.theorem import GAP, GRADIENT, INPUTS, KIND, OUTPUTS, measured, pairs_in_theory


def test_gap_and_gradient_of_one_example() -> None:
    """y = 0, the optimum says 1 and the model 3, in the first of four numbers; x = (1, 0, …): ∂ (wx)² / 4 = 2 · 3 / 4."""
    answer, y, best, x = torch.zeros(OUTPUTS), torch.zeros(OUTPUTS), torch.zeros(OUTPUTS), torch.zeros(INPUTS)
    answer[0], best[0], x[0] = 3.0, 1.0, 1.0
    target = torch.cat([y, best, x])[None]
    assert KIND.losses(answer[None], target).tolist() == [9 / 4]
    assert KIND.metrics(KIND.statistics(answer[None], target)) == {"loss": 9 / 4, "gap": 9 / 4 - 1 / 4, "gradient": 1.5}


@pytest.mark.parametrize(("disagreement", "low", "high"), [(0.0, 0.0, 0.1), (1.0, 0.2, 2.0)])
def test_the_server_serves_two_pairs_worse_where_their_optima_differ(
    disagreement: float, low: float, high: float
) -> None:
    """The best single map has a gap of δ² · (1 − 1/2), on average over the maps that are drawn."""
    found = measured(2, 1, disagreement)
    assert low < found[GAP]["server"] < high
    assert found[GAP]["personal"] < 0.1
    assert found[GAP]["tap"] < 0.1
    assert found[GRADIENT].keys() == {"server", "personal", "tap"}


def test_slopes_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up gaps: the server's grows by a tenth with each doubling, by two with the second seed."""

    def made_up(pairs: int, seed: int, disagreement: float) -> Values:
        server = 0.1 * seed * (pairs.bit_length() - 1)
        return {figure: {"server": disagreement * server, "personal": 0.5} for figure in (GAP, GRADIENT)}

    monkeypatch.setattr(theorem, "measured", made_up)
    told: list[str] = []
    pairs_in_theory([1, 2], 2.0, told.append).write(tmp_path)
    with (tmp_path / "pairs.csv").open() as file:
        rows = {(r["figure"], r["line"], r["pairs in the federation"]): r for r in csv.DictReader(file)}
    slope = rows[GAP[0], "server", "slope"]
    assert float(slope["mean"]) == pytest.approx((0.2 + 0.4) / 2)
    assert float(slope["half_interval_95"]) == pytest.approx(12.7062 * 0.1, rel=1e-4)  # t(1) · s / √2
    assert float(rows[GAP[0], "personal", "slope"]["mean"]) == pytest.approx(0.0, abs=1e-12)
    assert float(rows[GRADIENT[0], "server", "16"]["mean"]) == pytest.approx(1.2)
    assert told == ["1/2 seed 1", "2/2 seed 2"]
