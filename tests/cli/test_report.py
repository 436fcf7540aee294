"""`tap-flower report`, and what `results.json` holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from .conftest import finished_run


def test_results_are_means_over_clients(tmp_path: Path) -> None:
    found = finished_run(tmp_path / "run")
    # Of two clients, with .5 and .75: the tenth percentile is a tenth of the way from the worst to the best.
    assert found["tasks"]["read"]["tap"] == {
        "loss": 2.0, "accuracy": 0.625, "worst": 0.5, "p10": pytest.approx(0.525), "std": pytest.approx(0.125 * 2**0.5),
    }  # fmt: skip
    assert found["tasks"]["read"]["server"] == {"loss": 2.0, "accuracy": 0.25, "worst": 0.25, "p10": 0.25, "std": 0.0}


def test_report_shows_the_headline_metric_of_each_task(command: Any, tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    code, out, _ = command("report", str(tmp_path / "run"))
    assert code == 0
    read = next(line for line in out.splitlines() if "read" in line)
    assert [cell.strip() for cell in re.split(r"\s{2,}", read.strip())] == ["read", "accuracy ↑", "0.250", "0.625", "3"]
    paint = next(line for line in out.splitlines() if "paint" in line)
    assert [cell.strip() for cell in re.split(r"\s{2,}", paint.strip())] == ["paint", "mse ↓", "0.125", "0.500", "0"]
    assert "3.0 MB sent to clients, 1.0 MB back" in " ".join(out.split())
    page = (tmp_path / "run" / "report.html").read_text()
    assert "paint" in page
    assert '<tr><th scope="row">read<td>worst client, accuracy ↑<td>0.250<td>0.500' in page
    assert "<td>worst client, mse" not in page  # one client has the task


def test_report_writes_where_it_is_told(command: Any, tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    code, out, _ = command("report", str(tmp_path / "run"), "-o", "deep/page.html")
    assert code == 0
    assert "to look at: deep/page.html" in out
    assert (tmp_path / "deep" / "page.html").exists()
    assert not (tmp_path / "run" / "report.html").exists()


def test_several_runs_are_averaged(command: Any, tmp_path: Path) -> None:
    for name, accuracy in (("one", 0.25), ("two", 0.75)):
        finished_run(tmp_path / name)
        text = (tmp_path / name / "results.json").read_text()
        changed = json.loads(text)
        changed["tasks"]["read"]["tap"]["accuracy"] = accuracy
        (tmp_path / name / "results.json").write_text(json.dumps(changed))
    code, out, _ = command("report", str(tmp_path / "one"), str(tmp_path / "two"))
    assert code == 0
    mean = out.split("mean of 2 runs, seeds 41, 41")[1]
    read = next(line for line in mean.splitlines() if "read" in line)
    assert re.split(r"\s{2,}", read.strip()) == ["read", "accuracy ↑", "0.250 ± 0.000", "0.500 ± 0.354", "3"]
    page = (tmp_path / "report.html").read_text()
    assert "0.500 ± 0.354" in page  # sqrt((.25² + .25²) / 1)


def test_a_run_that_is_given_twice_is_refused(command: Any, tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    code, _, err = command("report", "run", str(tmp_path / "run"))
    assert (code, "is given twice: one run is no repetition of itself, give it once" in err) == (1, True)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is no run folder"),
        ({}, "holds no results.json: the run has not finished; go on with"),
        ({"results.json": "{"}, "results.json is damaged"),
        ({"results.json": "[]"}, "results.json is damaged: it holds a list"),
        ({"results.json": '{"schema": 7}'}, "has schema 7, not 2"),
        ({"results.json": '{"schema": 2}'}, "is damaged: it lacks bytes"),
    ],
)
def test_an_unreadable_run_folder_is_an_error(
    command: Any, tmp_path: Path, content: dict[str, str] | None, problem: str
) -> None:
    run = tmp_path / "run"
    if content is not None:
        run.mkdir()
        for name, text in content.items():
            (run / name).write_text(text)
    code, out, err = command("report", str(run))
    assert code == 1
    assert problem in err
    assert "Traceback" not in out + err


def test_a_report_says_who_is_missing_and_what_was_lost(command: Any, tmp_path: Path) -> None:
    found = finished_run(tmp_path / "run")
    found |= {"missing": {"cleo": "its node has <gone>"}, "marks": {"ann": ["it had no state of this run"]}}
    (tmp_path / "run" / "results.json").write_text(json.dumps(found))
    code, out, _ = command("report", str(tmp_path / "run"))
    said = " ".join(out.split())
    assert code == 0
    assert "client 'cleo' was not evaluated: its node has <gone>" in said
    assert "client 'ann': it had no state of this run" in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<li>client &#39;cleo&#39; was not evaluated: its node has &lt;gone&gt;</li>" in page
    assert "<li>client &#39;ann&#39;: it had no state of this run</li>" in page


def test_means_over_different_clients_are_told(command: Any, tmp_path: Path) -> None:
    found = finished_run(tmp_path / "run")
    found["clients"]["bob"]["paint"] = {}  # as a task without test rows
    (tmp_path / "run" / "results.json").write_text(json.dumps(found))
    _, out, _ = command("report", str(tmp_path / "run"))
    said, page = " ".join(out.split()), (tmp_path / "run" / "report.html").read_text()
    for text in (
        "client 'bob' has no test rows of task 'paint': the means of the task are without it",
        "task 'read': its means are over different numbers of clients, so they cannot be compared: server over 1, tap",
    ):
        assert text in said
        assert text in page.replace("&#39;", "'")


def test_only_runs_that_differ_in_nothing_but_their_seed_are_averaged(command: Any, tmp_path: Path) -> None:
    for rounds in (3, 5):
        for seed in (1, 2):
            run = tmp_path / f"rounds-{rounds}" / f"seed-{seed}"
            finished_run(run)
            (run / "config.yaml").write_text(f"seed: {seed}\nrounds: {rounds}\n")
    runs = [f"rounds-{rounds}/seed-{seed}" for rounds in (3, 5) for seed in (1, 2)]
    code, out, _ = command("report", *(str(tmp_path / run) for run in runs), "-o", str(tmp_path / "page.html"))
    assert code == 0
    assert out.count("mean of 2 runs") == 2
    assert "mean of 4 runs" not in out
    assert "the runs differ, besides the seed, in rounds" in out
    page = (tmp_path / "page.html").read_text()
    assert "TAP (rounds-3/seed-1)" in page
    assert "TAP (rounds-5/seed-1)" in page
    assert all(f"Clients of {run}" in page for run in runs)
