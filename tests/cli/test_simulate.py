from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tap_flower.config import load_config, plain
from tap_flower.errors import SimulationError
from tap_flower.files import write_tensors
from tap_flower.run import resources, simulation
from tap_flower.run.resources import Machine, Resources
from tap_flower.run.simulation import Launch
from tap_flower.server import checkpoint

from .conftest import finished_run


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--preset", "nope"], "unknown preset 'nope': use one of"),
        (["--set", "train.stepz=1"], "did you mean 'train.steps'?"),
        (["--set", "method=tapp"], "unknown method 'tapp' (did you mean 'tap'?)"),
        (["--set", "trackers=tensorbord"], "trackers has 'tensorbord': use some of tensorboard, mlflow, wandb"),
        (["--rounds", "0"], "rounds = 0 is out of bounds"),
        (["--config", "nowhere.yaml"], "'nowhere.yaml' cannot be read: there is no such file"),
        (["--set", "clients=[]"], "has no clients"),
        (["--cpus-per-client", "5"], "--cpus-per-client 5: this process may use 4 cores"),
        (
            ["--gpus-per-client", "0.5"],
            "--gpus-per-client 0.5: torch sees no GPU on this machine: leave the option out",
        ),
        (["--out", "OUT", "--resume"], "out does not exist, so that nothing can be resumed: give the run's folder"),
        (["--out", "USED", "--resume"], "used holds no run, so that nothing can be resumed: give the run's folder"),
        (["--set", "train.steps=ten"], "could not be converted to Integer: choose a number between 1 and"),
        (["--set", "method=TAP"], "unknown method 'TAP' (did you mean 'tap'?)"),
        (
            ["--out", "USED"],
            "is not empty: give another folder (`--out`, run_folder), or go on (`--resume`, resume=True)",
        ),
    ],
)
def test_bad_input_is_told_before_anything_starts(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], problem: str
) -> None:
    monkeypatch.setattr(simulation, "simulate", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(resources, "this_machine", lambda: Machine(cores=4, gpus=0))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("precious")
    known = {"OUT": str(tmp_path / "out"), "USED": str(tmp_path / "used")}
    code, out, err = command("simulate", *(known.get(a, a) for a in arguments))
    assert code == 1
    assert problem in err
    assert "Traceback" not in out + err
    assert (tmp_path / "used" / "file").read_text() == "precious"


def begun(folder: Path, rounds: int) -> None:
    """A run folder of the demo, seed 41, after some complete rounds."""
    progress = checkpoint.Progress("r", plain(load_config("demo")), round=rounds)
    checkpoint.save(folder / "server", progress, {}, {})


def test_a_resume_with_other_settings_names_them_before_anything_starts(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "simulate", lambda *_: pytest.fail("started"))
    begun(tmp_path / "run", rounds=1)
    options = ("--set", "train.steps=2", "--rounds", "3", "--out", str(tmp_path / "run"), "--resume")
    code, _, err = command("simulate", *options)
    assert code == 1
    assert "run was started with another configuration (rounds was 8, and is 3; train.steps was " in err
    assert ", and is 2): resume it with that one" in err


def test_a_run_that_has_finished_is_not_run_again(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "simulate", lambda *_: pytest.fail("started"))
    begun(tmp_path / "run", rounds=8)
    finished_run(tmp_path / "run")
    code, out, _ = command("simulate", "--out", str(tmp_path / "run"), "--resume")
    assert code == 0
    assert "has finished" in out


def test_a_resume_says_after_which_round_it_goes_on(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: Any) -> Any:
        raise SimulationError("enough seen")

    monkeypatch.setattr(simulation, "simulate", started)
    begun(tmp_path / "run", rounds=1)
    code, out, err = command("simulate", "--out", str(tmp_path / "run"), "--resume")
    assert (code, "enough seen" in err) == (1, True)
    assert "run after 1 complete round" in out


def test_a_folder_in_which_a_run_is_going_on_is_refused(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "simulate", lambda *_: pytest.fail("started"))
    begun(tmp_path / "run", rounds=1)
    with checkpoint.locked(tmp_path / "run", resume=True):
        for more in ((), ("--resume",)):
            code, _, err = command("simulate", "--out", str(tmp_path / "run"), *more)
            assert code == 1
            assert "another process runs in" in err


def test_a_backbone_in_a_folder_that_is_not_there_is_told(command: Any, tmp_path: Path) -> None:
    code, _, err = command("simulate", "--set", f"backbone={tmp_path / 'nope'}", "--out", str(tmp_path / "run"))
    assert code == 1
    assert f"there is no folder {tmp_path / 'nope'}: give the folder of a checkpoint" in err


def test_a_client_spec_is_no_configuration(command: Any, tmp_path: Path) -> None:
    (tmp_path / "client.yaml").write_text("name: ann\nbackbone: demo\ntasks: []\n")
    code, _, err = command("simulate", "--config", str(tmp_path / "client.yaml"))
    assert code == 1
    assert "this is a client spec: give a file that has it in a list, under `clients:`" in err


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_run_that_failed_before_its_first_round_is_not_in_the_way(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    monkeypatch.setattr(simulation, "simulate", lambda launch, *_: finished_run(launch.out))
    begun(tmp_path / "run", rounds)
    code, _, err = command("simulate", "--set", "train.steps=2", "--out", str(tmp_path / "run"))
    assert (code, "run is not empty" in err) == ((1, True) if rounds else (0, False))


def test_an_unknown_option_is_an_error(command: Any) -> None:
    code, _, err = command("simulate", "--wrong")
    assert code == 2
    assert "--wrong" in err


def test_a_failed_run_exits_with_an_error(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(launch: Launch, *_: object) -> None:
        raise SimulationError(f"{launch.clients} clients failed")

    monkeypatch.setattr(simulation, "simulate", fail)
    code, _, err = command("simulate", "--out", str(tmp_path / "run"))
    assert code == 1
    assert "12 clients failed" in err


def test_options_reach_the_run(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    launched: list[Launch] = []

    def fake(launch: Launch, *_: object) -> dict[str, Any]:
        launched.append(launch)
        return finished_run(launch.out)

    monkeypatch.setattr(simulation, "simulate", fake)
    monkeypatch.setattr(resources, "this_machine", lambda: Machine(cores=16, gpus=2))
    (tmp_path / "runs" / "demo-seed7").mkdir(parents=True)
    code, out, _ = command(
        "simulate", "--rounds", "4", "--seed", "7", "--set", "train.steps=3", "--gpus-per-client", "0.5"
    )
    assert code == 0
    (launch,) = launched
    assert launch.settings == ("train.steps=3", "rounds=4", "seed=7")
    assert (launch.preset, launch.clients) == ("demo", 12)
    assert launch.resources == Resources(cpus_per_client=4, on_a_gpu=2, gpus=2, at_once=4)
    assert "12 clients: 4 at once, 4 cores each, 2 on a GPU" in out
    assert launch.out == Path("runs/demo-seed7-2")  # the first one is taken
    assert "results in runs/demo-seed7-2, to look at: runs/demo-seed7-2/report.html" in out
    assert (launch.out / "report.html").exists()


def test_a_tracker_that_is_not_installed_is_told_before_anything_starts(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "simulate", lambda *_: pytest.fail("started"))
    monkeypatch.setattr("tap_flower.report.trackers.find_spec", lambda _: None)
    code, _, err = command("simulate", "--set", "trackers=tensorboard")
    assert code == 1
    assert "trackers has 'tensorboard', whose package is not installed" in err
    assert "from a checkout: pip install -e '.[tensorboard]'" in err


def test_what_is_hardly_meant_is_said_before_the_run(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "simulate", lambda launch, *_: finished_run(launch.out))
    code, out, _ = command("simulate", "--set", "clients_per_round=50", "--out", str(tmp_path / "run"))
    assert code == 0
    assert "clients_per_round = 50, and there are 12 clients: all of them train in every round" in out


def test_an_interrupted_run_says_how_to_go_on(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def interrupted(launch: Launch, *_: object) -> None:
        if "seed=8" not in launch.settings:
            write_tensors(launch.out / "server" / "server.safetensors", {}, {})
        raise KeyboardInterrupt

    monkeypatch.setattr(simulation, "simulate", interrupted)
    code, out, _ = command("simulate", "--seed", "7")
    assert code
    assert "to go on, give the same command with --out runs/demo-seed7 --resume" in out
    _, out, _ = command("simulate", "--seed", "7")
    assert "runs/demo-seed7 holds a run that has not ended, which --resume would go on with" in out
    assert "--out runs/demo-seed7-2 --resume" not in command("simulate", "--seed", "8")[1]


def test_a_ray_cluster_is_shared_by_what_the_options_say(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[Launch] = []

    def fake(launch: Launch, *_: object) -> dict[str, Any]:
        launched.append(launch)
        return finished_run(launch.out)

    monkeypatch.setattr(simulation, "simulate", fake)
    monkeypatch.setattr(resources, "this_machine", lambda: pytest.fail("the clients run elsewhere"))
    monkeypatch.setattr(resources, "check_cluster", lambda address: None)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    code, out, _ = command("simulate", "--cpus-per-client", "64", "--out", str(tmp_path / "run"))
    assert code == 0
    assert launched[0].resources == Resources(cpus_per_client=64)
    assert "12 clients: as many as fit at once, 64 cores each, no GPU" in out


def test_a_metric_that_will_be_missing_is_said_before_the_run(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "simulate", lambda launch, *_: finished_run(launch.out))
    chosen = ("--set", "metrics.bertscore=none/such", "--out", str(tmp_path / "run"))
    code, out, _ = command("simulate", *chosen)
    assert code == 0
    assert re.search(r"^BERTScore is left out: .* To get it: ", out, re.MULTILINE)


def test_presets_are_listed(command: Any) -> None:
    code, out, _ = command("presets")
    assert code == 0
    assert "demo" in out
    assert "dates" in out
    assert "flava: 30 clients, 200 rounds of 2" in out
    assert "cais/mmlu" in out
    assert "100,000" in out
