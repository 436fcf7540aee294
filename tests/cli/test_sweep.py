"""What `sweep` and `study` say and write; tests/study/test_execute.py runs sweeps."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tap_flower.config import load_config, to_yaml
from tap_flower.files import write_json
from tap_flower.run.resources import Machine
from tap_flower.study import execute, heterogeneity, theorem
from tap_flower.study.execute import Outcome, Share
from tap_flower.study.plan import PlannedRun
from tap_flower.study.studies import Study, Values

from .conftest import finished_run

Executed = list[tuple[str, Share, list[str]]]
"""Address of the cluster, a run's share of it, labels of the runs."""


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> Executed:
    """Every run finishes at once, but for those of the method `local`."""
    found: Executed = []
    joined: list[str] = []

    @contextmanager
    def cluster(address: str) -> Iterator[list[Machine]]:
        joined.append(address)
        yield [Machine(4, 0)]

    def run(runs: Sequence[PlannedRun], share: Share, finished: Callable[[Outcome], None]) -> None:
        found.append((joined[-1], share, [run.label for run in runs]))
        for planned in runs:
            if planned.label != "local":
                finished_run(planned.folder)
            finished(Outcome(planned, 3.0, "it diverged" if planned.label == "local" else ""))

    monkeypatch.setattr(execute, "cluster", cluster)
    monkeypatch.setattr(execute, "execute", run)
    return found


def test_a_sweep_runs_what_is_missing_and_says_what_failed(command: Any, tmp_path: Path, executed: Executed) -> None:
    (tmp_path / "sweep.yaml").write_text("seeds: [41]\nmethods: [tap, local]\n")
    status, out, err = command("sweep", "sweep.yaml", "--ray", "10.0.0.1:6379", "--cpus-per-run", "3")
    assert status == 1
    assert executed == [("10.0.0.1:6379", Share(3, 0), ["tap", "local"])]
    assert "2 runs, 0 of them finished; 3 cores each" in out
    assert "1/2 tap, seed 41: 3 s" in out
    assert "2/2 local, seed 41: failed: it diverged" in out
    assert "1 runs failed, see above" in err
    assert {"table.md", "table.csv", "table.tex", "table.html"} <= {
        path.name for path in (tmp_path / "runs" / "sweep").iterdir()
    }


@pytest.mark.parametrize(
    ("arguments", "page", "runs"),
    [
        (["margin", "--margin", "0", "--margin", "0.1", "--seed", "1"], "runs/study-margin", 2),
        (["pairs", "--preset", "demo", "--seed", "1", "--out", "pairs"], "pairs", 12),
    ],
)
def test_a_study_writes_its_page(
    command: Any,
    tmp_path: Path,
    executed: Executed,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    page: str,
    runs: int,
) -> None:

    written: list[Path] = []
    monkeypatch.setattr(Study, "write", lambda self, out: written.append(out) or out / "study.html")
    status, out, _ = command("study", *arguments)
    assert status == 0
    ((address, share, labels),) = executed
    assert (address, share.gpus) == ("local", 0)
    assert len(labels) == runs
    assert written == [Path(page)]
    assert f"to look at: {page}/study.html" in out


def test_tables_of_the_runs_that_are_there(command: Any, tmp_path: Path, executed: Executed) -> None:
    (tmp_path / "sweep.yaml").write_text("seeds: [41, 42]\nmethods: [tap, fedavg]\n")
    status, _, err = command("sweep", "sweep.yaml", "--tables")
    assert (status, "sweep holds no finished run of sweep.yaml: leave --tables out to run them" in err) == (1, True)
    status, _, err = command("sweep", "sweep.yaml")
    assert status == 0, err
    for folder in (tmp_path / "runs" / "sweep").glob("*/seed-*"):  # as a run would have left it
        settings = [f"method={folder.parent.name}", f"seed={folder.name.removeprefix('seed-')}"]
        (folder / "config.yaml").write_text(to_yaml(load_config(settings=settings)))
    shutil.rmtree(tmp_path / "runs" / "sweep" / "fedavg" / "seed-42")
    (tmp_path / "runs" / "sweep" / "table.md").unlink()
    executed.clear()
    status, out, err = command("sweep", "sweep.yaml", "--tables")
    assert (status, executed, err) == (0, [], "")
    assert "4 runs, 3 of them finished" in out
    assert (tmp_path / "runs" / "sweep" / "table.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "out"], "--keep out and --out out are one folder, or one holds the other"),
        (["--keep", "out/kept"], "--keep out/kept and --out out are one folder, or one holds the other"),
        (["--keep", "."], "--keep . and --out out are one folder, or one holds the other"),
        (
            ["--tables", "--ray", "auto", "--gpus-per-run", "1"],
            "--ray and --gpus-per-run would have no effect: --tables",
        ),
        (["--keep", "file/kept"], "the folder file/kept cannot be made, since file is a file: give another folder"),
        (["--out", "file"], "the folder file/tap/seed-41 cannot be made, since file is a file: give another folder"),
    ],
)
def test_what_a_sweep_cannot_do_is_told_before_it_runs(
    command: Any, tmp_path: Path, executed: Executed, arguments: list[str], message: str
) -> None:
    (tmp_path / "sweep.yaml").write_text("seeds: [41]\nmethods: [tap]\n")
    (tmp_path / "file").write_text("")
    status, _, err = command("sweep", "sweep.yaml", "--out", "out", *arguments)
    assert (status, executed) == (1, [])
    assert message in err


def test_a_cluster_of_the_environment_is_no_mistake(
    command: Any, tmp_path: Path, executed: Executed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(theorem, "measured", lambda *_: {theorem.GAP: {"server": 1.0}})
    status, _, err = command("study", "pairs", "--seed", "7")
    assert status == 0, err
    (tmp_path / "file").write_text("")
    status, _, err = command("study", "pairs", "--seed", "7", "--out", "file")
    assert (status, "the folder file cannot be made, since file is a file" in err) == (1, True)


def test_a_sweep_names_answers_that_could_not_be_used(
    command: Any, tmp_path: Path, executed: Executed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def partly(runs: Sequence[PlannedRun], share: Share, finished: Callable[[Outcome], None]) -> None:
        for planned in runs:
            found = finished_run(planned.folder) | {"dropped": {"client 'ann'": 2}}
            write_json(planned.folder / "results.json", found)
            finished(Outcome(planned, 3.0, ""))

    monkeypatch.setattr(execute, "execute", partly)
    (tmp_path / "sweep.yaml").write_text("seeds: [41]\nmethods: [tap, fedavg]\n")
    status, out, err = command("sweep", "sweep.yaml")
    assert status == 0, err
    assert "1/2 tap, seed 41: 3 s, client 'ann': 2 answers could not be used" in out
    table = (tmp_path / "runs" / "sweep" / "table.md").read_text()
    assert "fedavg, seed 41: client 'ann': 2 answers could not be used." in table


def test_what_is_finished_is_not_run_again(command: Any, tmp_path: Path, executed: Executed) -> None:
    (tmp_path / "sweep.yaml").write_text("seeds: [41]\nmethods: [tap]\n")
    folder = tmp_path / "runs" / "sweep" / "tap" / "seed-41"
    finished_run(folder)
    (folder / "config.yaml").write_text(to_yaml(load_config("demo", settings=["method=tap", "seed=41"])))
    status, out, _ = command("sweep", "sweep.yaml")
    assert status == 0
    assert executed == []
    assert "1 runs, 1 of them finished" in out
    status, out, _ = command("sweep", "sweep.yaml", "--keep", "kept")
    assert status == 0
    assert "1 runs kept in kept" in out
    assert (tmp_path / "kept" / "tap" / "seed-41" / "results.json").exists()
    shutil.rmtree(tmp_path / "runs")  # as on another machine
    status, out, _ = command("sweep", "sweep.yaml", "--keep", "kept")
    assert status == 0
    assert executed == []
    assert "1 runs, 1 of them finished" in out
    (tmp_path / "sweep.yaml").write_text("seeds: [41]\nmethods: [tap]\nset: {train.steps: 3}\n")
    status, _, err = command("sweep", "sweep.yaml", "--keep", "kept")
    assert status == 1
    assert "kept/tap/seed-41 holds a run with another configuration (train.steps differ)" in err


def test_a_run_is_kept_when_it_finishes(
    command: Any, tmp_path: Path, executed: Executed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first(runs: Sequence[PlannedRun], _: Share, finished: Callable[[Outcome], None]) -> None:
        finished_run(runs[0].folder)
        (runs[0].folder / "config.yaml").write_text(to_yaml(runs[0].resolved))
        finished(Outcome(runs[0], 3.0, ""))
        raise KeyboardInterrupt

    monkeypatch.setattr(execute, "execute", first)
    (tmp_path / "sweep.yaml").write_text("seeds: [41]\nmethods: [tap, local]\n")
    command("sweep", "sweep.yaml", "--keep", "kept")
    assert (tmp_path / "kept" / "tap" / "seed-41" / "results.json").exists()
    assert not (tmp_path / "kept" / "local").exists()


def test_a_study_does_not_take_over_runs_of_another_configuration(
    command: Any, tmp_path: Path, executed: Executed
) -> None:
    folder = tmp_path / "runs" / "study-margin" / "margin-0" / "seed-1"
    finished_run(folder)
    (folder / "config.yaml").write_text(to_yaml(load_config("demo", settings=["method=tap", "train.steps=3"])))
    status, _, err = command("study", "margin", "--margin", "0", "--seed", "1")
    assert status == 1
    assert "seed-1 holds a run with another configuration (" in err
    assert "train.steps" in err
    assert executed == []


def test_newcomers_are_run_after_the_federations(command: Any, tmp_path: Path, executed: Executed) -> None:
    status, out, err = command("study", "newcomers", "--method", "tap", "--seed", "1", "--out", "new")
    assert [labels for _, _, labels in executed] == [["tap, federation"], ["tap", "local"]]
    assert status == 1  # of `local`
    assert "1 runs failed" in err
    assert "tables in new/table.md" in out
    assert "What is a federation worth to newcomers?" in (tmp_path / "new" / "table.html").read_text()


def test_label_skew_is_planned_by_its_options(
    command: Any, tmp_path: Path, executed: Executed, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def planned(*options: Any) -> Study:
        asked.append(options)
        return Study("heterogeneity", "What?", "", "alpha", (), lambda _: [(0.0, {("t", "score"): {"tap": 0.5}})])

    monkeypatch.setattr(heterogeneity, "heterogeneity_study", planned)
    status, out, _ = command(
        "study", "heterogeneity", "--alpha", "0.5", "--seed", "7", "--set", "rounds=2", "--out", "a"
    )
    assert status == 0
    assert asked == [("demo", "", ["rounds=2"], [7], ("tap", "fedavg+finetune"), [0.5], Path("a"))]
    assert executed == []
    assert "to look at: a/heterogeneity.html" in out
    assert (tmp_path / "a" / "heterogeneity.csv").exists()


def test_pairs_without_a_preset_are_linear_maps(
    command: Any, tmp_path: Path, executed: Executed, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, float]] = []

    def measured(pairs: int, seed: int, disagreement: float) -> Values:
        asked.append((pairs, seed, disagreement))
        return {theorem.GAP: {"server": float(pairs)}}

    monkeypatch.setattr(theorem, "measured", measured)
    status, out, _ = command("study", "pairs", "--seed", "7", "--disagreement", "0.5", "--out", "pairs")
    assert status == 0
    assert asked == [(pairs, 7, 0.5) for pairs in (1, 2, 4, 8, 16)]
    assert executed == []
    assert "to look at: pairs/pairs.html" in out
    assert (tmp_path / "pairs" / "pairs.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "rounds=3"], "--config and --set are of a preset's clients: name it"),
        (["--ray", "nosuch:99", "--cpus-per-run", "64"], "--ray and --cpus-per-run would have no effect: linear maps"),
        (["--preset", "demo", "--disagreement", "1"], "--disagreement is of the linear maps: leave it out"),
    ],
)
def test_options_of_the_other_study_of_pairs_are_refused(command: Any, arguments: list[str], message: str) -> None:
    status, _, err = command("study", "pairs", *arguments)
    assert status == 1
    assert message in err
