"""A comparison of made-up results, in all its forms."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tap_flower.core.headline import Headline
from tap_flower.errors import ConfigError
from tap_flower.files import write_json
from tap_flower.report.results import results as collected_results
from tap_flower.report.terminal_tables import terminal
from tap_flower.study.comparison import OVERALL, Comparison, compare
from tap_flower.study.plan import PlannedRun, Sweep
from tap_flower.study.sweep_tables import comparison_tables, latex, markdown, to_csv

VALUES = {"tap": (0.8, 0.4), "fedavg": (0.6, 0.5), "local": (0.7, 0.4)}
"""Method -> accuracy, squared error with seed 1; a hundredth more with each further seed."""


def results(method: str, model: str, accuracy: float, error: float, seed: int) -> dict[str, Any]:
    tasks = {"digits_1": {model: {"accuracy": accuracy, "loss": 1.0}}, "images": {model: {"mse": error, "loss": error}}}
    return {
        "schema": 2, "preset": "demo", "method": method, "seed": seed, "rounds": 2, "clients": {}, "tasks": tasks,
        "kinds": {"digits_1": "image_classification", "images": "image_generation"}, "replacements": {},
        "bytes": {"down": 2_000_000, "up": 1_000_000}, "steps": {"ann": 4, "bob": 6}, "seconds": {"total": 3.0},
    }  # fmt: skip


@pytest.fixture
def found(tmp_path: Path) -> Comparison:
    model = {"tap": "tap", "fedavg": "server", "local": "local"}
    runs = [
        PlannedRun(label, seed, "demo", "", (), tmp_path / label / str(seed)) for seed in (1, 2) for label in VALUES
    ]
    for run in runs:
        if (run.label, run.seed) != ("local", 2):  # not finished yet
            accuracy, error = (value + 0.01 * (run.seed - 1) for value in VALUES[run.label])
            write_json(run.folder / "results.json", results(run.label, model[run.label], accuracy, error, run.seed))
    return compare(Sweep({"rounds": {(run.label, run.seed): run for run in runs}}, model, "tap"))


def test_means_ranks_and_differences(found: Comparison) -> None:
    digits, images, overall = found.quality
    assert (digits.name, digits.unit, images.unit, overall.name) == ("digits_1", "accuracy ↑", "mse ↓", OVERALL)
    assert digits.values["tap"].mean == pytest.approx(0.805)
    assert digits.best == {"tap"}
    assert digits.differences["fedavg"].mean == pytest.approx(-0.2)
    assert digits.differences["fedavg"].half == pytest.approx(0.0, abs=1e-9)
    assert digits.differences["local"].count == 1
    assert images.differences["fedavg"].mean == pytest.approx(-0.1)  # a larger error is worse
    assert overall.values["tap"].mean == pytest.approx(((0.8 + 0.6) / 2 + (0.81 + 0.59) / 2) / 2)
    # Only seed 1 has all three: ranks 1, 3, 2 and 1.5, 3, 1.5.
    assert found.ranks == {"tap": 1.25, "fedavg": 3.0, "local": 1.75}
    assert {row.name: row.values["tap"].mean for row in found.costs} == {
        "MB to clients": 2.0, "MB back": 1.0, "rounds": 2, "optimiser steps": 10, "seconds": 3.0,
    }  # fmt: skip


def test_a_method_that_has_not_finished_with_a_seed_is_named(found: Comparison) -> None:
    quality, _, *_ = comparison_tables(found)
    assert "over up to 2 seeds (1, 2)" in quality.caption
    assert quality.note == "local has not finished with seed 2. The mean rank is over seed 1 alone."
    rows = list(csv.DictReader(io.StringIO(to_csv([found]))))
    assert {row["method"]: row["seeds"] for row in rows if row["what"] == "mean rank"} == dict.fromkeys(VALUES, "1")
    assert {row["method"]: row["seeds"] for row in rows if row["name"] == "rounds"} == {
        "tap": "2",
        "fedavg": "2",
        "local": "1",
    }


def test_results_of_two_kinds_of_a_task_are_no_sweep(tmp_path: Path) -> None:
    runs = {(label, 1): PlannedRun(label, 1, "demo", "", (), tmp_path / label) for label in ("tap", "local")}
    for (label, _), run in runs.items():
        written = results(label, label, 0.5, 0.5, 1)
        if label == "local":
            written["kinds"]["images"] = "image_classification"
        write_json(run.folder / "results.json", written)
    with pytest.raises(ConfigError, match="task 'images' is not compared: by this name runs have image_generation"):
        compare(Sweep({"rounds": runs}, {"tap": "tap", "local": "local"}, "tap"))


ODD = r"a|b [x^2{~\y"
"""A label with letters that mean something in Markdown, in LaTeX and on a terminal."""


def test_odd_labels_reach_the_tables_whole(tmp_path: Path) -> None:
    runs = {(ODD, 1): PlannedRun(ODD, 1, "demo", "", (), tmp_path / "odd")}
    write_json(runs[ODD, 1].folder / "results.json", results("tap", "tap", 0.5, 0.5, 1))
    tables = comparison_tables(compare(Sweep({"rounds": runs}, {ODD: "tap"}, ODD)))
    assert r"| task | metric | a\|b [x^2{~\\y |" in markdown(tables).splitlines()
    assert r"a$|$b [x\textasciicircum{}2\{\textasciitilde{}\textbackslash{}y \\" in latex(tables)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(terminal(replace(tables[0], header=["task", "[b]metric[/i]", "tap"], caption="[/u]", note="[/u]")))
    assert console.export_text().count("[/u]") == 2


def test_nothing_has_finished(tmp_path: Path) -> None:
    none = compare(
        Sweep({"rounds": {("tap", 1): PlannedRun("tap", 1, "demo", "", (), tmp_path / "tap")}}, {"tap": "tap"}, "tap")
    )
    assert comparison_tables(none) == []
    assert to_csv([none]).splitlines() == ["budget,what,name,unit,method,mean,half_interval_95,seeds,p,p_holm"]


def test_a_task_whose_second_stage_has_failed_is_left_out_and_told(tmp_path: Path) -> None:
    runs = {("tap", seed): PlannedRun("tap", seed, "demo", "", (), tmp_path / str(seed)) for seed in (1, 2)}
    for (_, seed), run in runs.items():
        written = results("tap", "tap", 0.5 * seed, 0.5, seed)
        if seed == 2:
            written["tasks"]["digits_1"] = {"server": {"accuracy": 0.5}}
        write_json(run.folder / "results.json", written)
    found = compare(Sweep({"rounds": runs}, {"tap": "tap"}, "tap"))
    assert {row.name: (row.values["tap"].mean, row.values["tap"].count) for row in found.quality} == {
        "digits_1": (0.5, 1), "images": (0.5, 2), OVERALL: (0.5, 1),
    }  # fmt: skip
    assert found.note == "tap, seed 2: task 'digits_1' has no results of tap, and is left out."


def test_a_method_without_a_second_stage_is_named_where_steps_are_equal(tmp_path: Path) -> None:
    model, runs = {"tap": "tap", "fedavg": "server"}, {}
    for label, name in model.items():
        runs[label, 1] = PlannedRun(f"{label}+steps", 1, "demo", "", (), tmp_path / label)
        write_json(runs[label, 1].folder / "results.json", results(label, name, 0.5, 0.5, 1))
    sweep = Sweep({"rounds": runs, "steps": runs}, model, "tap")
    text = markdown(comparison_tables(compare(sweep, "steps")))
    assert text.startswith("**Equal optimiser steps: test data")
    assert "\nWithout a stage 2, with equal steps in stage 1 alone: fedavg.\n" in text
    assert "Without a stage 2" not in markdown(comparison_tables(compare(sweep, "rounds")))


SCORES = {
    "tap": {"ann": (0.9, 0.8, 0.7), "bob": (0.4, 0.5, 0.6), "cleo": (0.2, 0.6, 0.6)},
    "alone": {"ann": (0.8, 0.7, 0.6), "bob": (0.5, 0.6, 0.7), "cleo": (0.5, 0.5, 0.5)},
}
"""Label -> client -> accuracy with three seeds: ann is served better, bob worse, cleo a little worse within the noise."""


def test_clients_beside_the_mean(tmp_path: Path) -> None:
    model, runs = {"tap": "tap", "alone": "local"}, {}
    for label, of_clients in SCORES.items():
        for seed in (1, 2, 3):
            found = {c: {"t": {model[label]: {"accuracy": values[seed - 1]}}} for c, values in of_clients.items()}
            written = collected_results(
                preset="demo", method=label, seed=seed, rounds=2, clients=found, kinds={"t": "text_classification"},
                headlines={"t": Headline("accuracy", True)},
                replacements={}, bytes_={"down": 0, "up": 0}, steps={}, marks={}, dropped={},
                missing={"dora": "its node has gone"} if (label, seed) == ("alone", 2) else {},
                seconds={"total": 1.0},
            )  # fmt: skip
            runs[label, seed] = PlannedRun(label, seed, "demo", "", (), tmp_path / label / str(seed))
            write_json(runs[label, seed].folder / "results.json", written)
    found = compare(Sweep({"rounds": runs}, model, "tap"))
    rows = {row.name: row.values for row in found.clients}
    assert rows["t: worst client"]["tap"].mean == pytest.approx((0.2 + 0.5 + 0.6) / 3)
    assert rows["t: tenth percentile"]["alone"].mean == pytest.approx((0.5 + 0.52 + 0.52) / 3)
    assert rows["t: standard deviation"]["alone"].mean == pytest.approx((0.03**0.5 + 0.01**0.5 + 0.01**0.5) / 3)
    assert rows[f"{OVERALL}: worst client"]["tap"] == rows["t: worst client"]["tap"]
    assert {name: one["tap"].mean for name, one in rows.items() if name.endswith("than local")} == {
        "better than local": pytest.approx(1 / 3), "not worse than local": pytest.approx(2 / 3),
    }  # fmt: skip
    assert "alone" not in rows["better than local"]
    text = markdown(comparison_tables(found))
    assert "| not worse than local | share ↑ | 0.667 | – |" in text
    assert "| t: worst client | accuracy ↑ | 0.433 ± 0.517 | 0.500 ± 0.000 |" in text
    assert "clients,not worse than local,share ↑,tap," in to_csv([found])
    assert "alone, seed 2: without dora, so that its means are over other clients." in text


def test_stars_are_of_corrected_p_values(tmp_path: Path) -> None:
    """Alone, b's difference of -1, -2, -3 hundredths would have p = .074, and that of a is a constant."""
    values = {"tap": (0.5, 0.5, 0.5), "a": (0.4, 0.4, 0.4), "b": (0.49, 0.48, 0.47), "c": (0.49, 0.4801, 0.4799)}
    runs = {}
    for label, of_seeds in values.items():
        for seed, accuracy in enumerate(of_seeds):
            runs[label, seed] = PlannedRun(label, seed, "demo", "", (), tmp_path / label / str(seed))
            write_json(runs[label, seed].folder / "results.json", results(label, label, accuracy, 0.5, seed))
    found = compare(Sweep({"rounds": runs}, {label: label for label in values}, "tap"))
    row = found.quality[0]
    ps = {label: one.p for label, one in row.differences.items()}
    assert ps["b"] == pytest.approx(1 - 12**0.5 / 14**0.5, rel=1e-4)
    assert ps["c"] is not None
    assert ps["c"] < 0.05 < 2 * ps["c"]
    assert row.p_values["c"] == pytest.approx(2 * ps["c"])
    assert row.p_values["a"] == pytest.approx(0.0, abs=1e-9)
    (cells,) = [c for c in markdown(comparison_tables(found)).splitlines() if c.startswith("| digits_1 | accuracy |")]
    assert cells.endswith("| -0.100 ± 0.000 | -0.020 ± 0.025 | -0.017 ± 0.014 |")


def test_terminal_and_markdown(found: Comparison) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    for part in comparison_tables(found):
        console.print(terminal(part))
    text = console.export_text()
    assert "0.805 ± 0.064" in text
    assert "-0.200 ± 0.000*" not in text  # equal differences say nothing of their spread
    assert "-0.200 ± 0.000" in text
    lines = markdown(comparison_tables(found)).splitlines()
    assert "| digits_1 | accuracy ↑ | **0.805 ± 0.064** | 0.605 ± 0.064 | 0.700 |" in lines
    assert "| mean rank | ↓ | **1.25** | 3.00 | 1.75 |" in lines
    tables = [line for line in lines if line.startswith("|")]
    assert all(line.count("|") in (5, 6) for line in tables)


def test_csv_has_all_digits(found: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv([found]))))
    (row,) = [r for r in rows if (r["what"], r["name"], r["method"]) == ("quality", "digits_1", "tap")]
    assert float(row["mean"]) == found.quality[0].values["tap"].mean
    assert float(row["half_interval_95"]) == found.quality[0].values["tap"].half
    assert {r["what"] for r in rows} == {"quality", "cost", "difference to tap", "mean rank"}


def test_latex_escapes_and_compiles(found: Comparison, tmp_path: Path) -> None:
    text = latex(comparison_tables(found))
    assert r"digits\_1 & accuracy $\uparrow$ & \textbf{0.805 $\pm$ 0.064} & 0.605 $\pm$ 0.064 & 0.700 \\" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    if (pdflatex := shutil.which("pdflatex")) is None:
        pytest.skip("there is no pdflatex")
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{text}\end{{document}}"
    (tmp_path / "table.tex").write_text(document)
    subprocess.run([pdflatex, "-halt-on-error", "table.tex"], cwd=tmp_path, check=True, capture_output=True)
