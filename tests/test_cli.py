from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from tap_flower import cli
from tap_flower.errors import SimulationError
from tap_flower.report.progress import RunProgress
from tap_flower.report.results import results
from tap_flower.run.resources import Machine, Resources
from tap_flower.run.simulation import Launch


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs `tap-flower ARGUMENTS` in an empty folder: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tap-flower", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def finished_run(folder: Path) -> dict[str, Any]:
    models = {"server": {"loss": 2.0, "accuracy": 0.25}, "tap": {"loss": 1.0, "accuracy": 0.75}}
    pictures = {"server": {"loss": 0.125, "mse": 0.125}, "tap": {"loss": 0.5, "mse": 0.5}}
    found = results(
        preset="demo",
        method="tap",
        seed=41,
        rounds=3,
        clients={"ann": {"read": models, "paint": pictures}, "bob": {"read": {"tap": {"loss": 3.0, "accuracy": 0.5}}}},
        kinds={"read": "text_classification", "paint": "image_generation"},
        replacements={"ann": {"read": 2, "paint": 0}, "bob": {"read": 1}},
        bytes_={"down": 3_000_000, "up": 1_000_000, "per_component": {}},
        steps={"ann": 12, "bob": 6},
        seconds={"total": 1.0},
    )
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(found))
    return found


def test_results_are_means_over_clients(tmp_path: Path) -> None:
    found = finished_run(tmp_path / "run")
    assert found["tasks"]["read"]["tap"] == {"loss": 2.0, "accuracy": 0.625}
    assert found["tasks"]["read"]["server"] == {"loss": 2.0, "accuracy": 0.25}


def test_report_shows_the_headline_metric_of_each_task(command: Any, tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    code, out, _ = command("report", str(tmp_path / "run"))
    assert code == 0
    read = next(line for line in out.splitlines() if "read" in line)
    assert [cell.strip() for cell in re.split(r"\s{2,}", read.strip())] == ["read", "accuracy ↑", "0.250", "0.625", "3"]
    paint = next(line for line in out.splitlines() if "paint" in line)
    assert [cell.strip() for cell in re.split(r"\s{2,}", paint.strip())] == ["paint", "mse ↓", "0.125", "0.500", "0"]
    assert "3.0 MB sent to clients, 1.0 MB back" in " ".join(out.split())
    assert "paint" in (tmp_path / "run" / "report.html").read_text()


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
    assert re.split(r"\s{2,}", read.strip()) == ["read", "accuracy ↑", "0.250", "0.500"]
    page = (tmp_path / "report.html").read_text()
    assert "0.500 ± 0.354" in page  # sqrt((.25² + .25²) / 1)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is no run folder"),
        ({}, "holds no results.json: the run has not finished; go on with"),
        ({"results.json": "{"}, "results.json is damaged"),
        ({"results.json": "[]"}, "results.json is damaged: it holds a list"),
        ({"results.json": '{"schema": 7}'}, "has schema 7, not 1"),
        ({"results.json": '{"schema": 1}'}, "is damaged: it lacks bytes"),
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


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--preset", "nope"], "unknown preset 'nope': use one of"),
        (["--set", "train.stepz=1"], "did you mean 'train.steps'?"),
        (["--set", "method=tapp"], "unknown method 'tapp' (did you mean 'tap'?)"),
        (["--set", "trackers=tensorbord"], "trackers has 'tensorbord': use some of tensorboard, mlflow, wandb"),
        (["--rounds", "0"], "rounds = 0 is out of bounds"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--set", "clients=[]"], "has no clients"),
        (["--cpus-per-client", "5"], "--cpus-per-client 5: this process may use 4 cores"),
        (
            ["--gpus-per-client", "0.5"],
            "--gpus-per-client 0.5: torch sees no GPU on this machine: leave the option out",
        ),
        (["--out", "OUT", "--resume"], "server.safetensors does not exist"),
        (["--out", "USED"], "is not empty: give another folder with `--out`, or go on with `--resume`"),
    ],
)
def test_bad_input_is_told_before_anything_starts(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], problem: str
) -> None:
    monkeypatch.setattr(cli, "simulate", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(cli, "this_machine", lambda: Machine(cores=4, gpus=0))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("precious")
    known = {"OUT": str(tmp_path / "out"), "USED": str(tmp_path / "used")}
    code, out, err = command("simulate", *(known.get(a, a) for a in arguments))
    assert code == 1
    assert problem in err
    assert "Traceback" not in out + err
    assert (tmp_path / "used" / "file").read_text() == "precious"


def test_an_unknown_option_is_an_error(command: Any) -> None:
    code, _, err = command("simulate", "--wrong")
    assert code == 2
    assert "--wrong" in err


def test_a_failed_run_exits_with_an_error(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(launch: Launch, on_event: object) -> None:
        raise SimulationError(f"{launch.clients} clients failed")

    monkeypatch.setattr(cli, "simulate", fail)
    code, _, err = command("simulate", "--out", str(tmp_path / "run"))
    assert code == 1
    assert "10 clients failed" in err


def test_options_reach_the_run(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    launched: list[Launch] = []

    def fake(launch: Launch, on_event: object) -> dict[str, Any]:
        launched.append(launch)
        return finished_run(launch.out)

    monkeypatch.setattr(cli, "simulate", fake)
    monkeypatch.setattr(cli, "this_machine", lambda: Machine(cores=16, gpus=2))
    (tmp_path / "runs" / "demo-seed7").mkdir(parents=True)
    code, out, _ = command(
        "simulate", "--rounds", "4", "--seed", "7", "--set", "train.steps=3", "--gpus-per-client", "0.5"
    )
    assert code == 0
    (launch,) = launched
    assert launch.settings == ("train.steps=3", "rounds=4", "seed=7")
    assert (launch.preset, launch.clients) == ("demo", 10)
    assert launch.resources == Resources(cpus_per_client=4, on_a_gpu=2, gpus=2, at_once=4)
    assert "10 clients: 4 at once, 4 cores each, 2 on a GPU" in out
    assert launch.out == Path("runs/demo-seed7-2")  # the first one is taken
    assert "results in runs/demo-seed7-2, to look at: runs/demo-seed7-2/report.html" in out
    assert (launch.out / "report.html").exists()


def test_a_ray_cluster_is_shared_by_what_the_options_say(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[Launch] = []

    def fake(launch: Launch, on_event: object) -> dict[str, Any]:
        launched.append(launch)
        return finished_run(launch.out)

    monkeypatch.setattr(cli, "simulate", fake)
    monkeypatch.setattr(cli, "this_machine", lambda: pytest.fail("the clients run elsewhere"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    code, out, _ = command("simulate", "--cpus-per-client", "64", "--out", str(tmp_path / "run"))
    assert code == 0
    assert launched[0].resources == Resources(cpus_per_client=64)
    assert "10 clients: as many as fit at once, 64 cores each, no GPU" in out


def test_a_metric_that_will_be_missing_is_said_before_the_run(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "simulate", lambda launch, _: finished_run(launch.out))
    chosen = ("--set", "metrics.bertscore=none/such", "--out", str(tmp_path / "run"))
    code, out, _ = command("simulate", *chosen)
    assert code == 0
    assert re.search(r"^BERTScore is left out: .* To get it: ", out, re.MULTILINE)


def test_presets_are_listed(command: Any) -> None:
    code, out, _ = command("presets")
    assert code == 0
    assert "demo" in out
    assert "translation" in out
    assert "flava: 30 clients, 200 rounds of 2" in out
    assert "cais/mmlu" in out
    assert "100,000" in out


def write_spec(folder: Path, **changes: Any) -> str:
    (folder / "train.csv").write_text("note,urgency\na dog runs,urgent\nthe law [asks],routine\na red hill,maybe\n")
    (folder / "good.csv").write_text("note,urgency\na dog runs,urgent\nthe law [asks],routine\n")
    task = {
        "name": "triage", "kind": "text_classification", "modalities": ["text"], "domain": "notes",
        "classes": ["urgent", "routine"], "columns": {"text": "note", "label": "urgency"},
        "train": {"format": "csv", "path": "good.csv"}, "test": {"format": "csv", "path": "good.csv"},
    }  # fmt: skip
    values = {"name": "hospital-a", "backbone": "demo", "tasks": [task | changes]}
    (folder / "spec.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "spec.yaml")


def test_a_good_client_spec_is_checked(command: Any, tmp_path: Path) -> None:
    code, out, _ = command("check", write_spec(tmp_path), "--set", "model.text_length=12")
    assert code == 0
    assert "urgent 1 (50%)" in out
    assert "[CLS] a dog runs [SEP]" in out
    assert "[CLS] the law [ asks ] [SEP]" in out  # no markup of the terminal
    assert "before texts are cut at 12" in out
    assert out.endswith("no problems found\n")


def test_all_problems_of_a_client_spec_are_listed(command: Any, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    spec = write_spec(
        tmp_path,
        train={"format": "csv", "path": "train.csv"},
        test={"format": "hub", "name": "owner/none", "split": "test"},
    )
    (tmp_path / "spec.yaml").write_text((tmp_path / "spec.yaml").read_text().replace(": demo", ": owner/model"))
    code, out, err = command("check", spec, "--data-root", str(tmp_path / "here"))
    assert code == 1
    for problem in (
        "has label 'maybe' in row 2",
        "test needs 'owner/none' 'test', which is not in data.root (neither",
        "backbone 'owner/model' gives no tokenizer",
        "is fetched with `hf download owner/model`",
        "4 problems found",
    ):
        assert problem in out
    assert "Traceback" not in out + err


@pytest.mark.parametrize(("content", "problem"), [(None, "cannot be read"), ("- 1", "holds no keys")])
def test_a_spec_that_cannot_be_read(command: Any, tmp_path: Path, content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "spec.yaml").write_text(content)
    code, _, err = command("check", str(tmp_path / "spec.yaml"))
    assert code == 1
    assert problem in err


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_rounds_losses_and_replacements(terminal: bool) -> None:
    console = Console(force_terminal=terminal, record=True, width=200, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with RunProgress(console) as progress:
        progress.show({"event": "start", "round": 0, "rounds": 2, "clients": {"ann": ["read"], "bob": ["read"]}})
        progress.show({"event": "round_start", "round": 1, "clients": ["ann", "bob"]})
        reports = {
            "ann": {"losses": {"read": 1.0}, "replacements": {"read": 1}},
            "bob": {"losses": {"read": 2.0}, "replacements": {"read": 1}},
        }
        progress.show({"event": "round", "round": 1, "clients": reports, "dropped": [], "seconds": 1.0})
        progress.show({"event": "dropped", "round": 1, "who": "client 'bob'", "problem": "broken"})
        progress.show({"event": "unheard of"})
        progress.show({"event": "distill_start", "clients": ["ann"]})
        progress.show({"event": "distilled", "client": "ann", "losses": {"read": 0.5}})
        progress.show({"event": "evaluate_start", "clients": ["ann"]})
        progress.show({"event": "evaluated", "client": "ann"})
    shown = console.export_text()
    for text in (
        "2 replacements",
        "read 1.500",
        "dropped the reply of client 'bob': broken",
        "distilling",
        "evaluating",
    ):
        assert text in shown
