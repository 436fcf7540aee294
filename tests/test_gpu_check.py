"""`benchmarks.gpu`: parts within limits of their own, rows kept as they come, and a whole check on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import BEGAN, measure, parity, step, workload
from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import clients, command, part, steps
from tap_flower.config import HyperParameters
from tap_flower.models import backbone
from tap_flower.models.load import bfloat16_products

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def test_parts_share_the_time_and_what_others_leave_over() -> None:
    names = list(command.PARTS)
    assert [command.limit_of(name, names, 600) for name in names] == [of.seconds for of in command.PARTS.values()]
    assert sum(command.limit_of(name, names, 60) for name in names) == pytest.approx(60)
    # Parity took 4 of its 50 s: the other parts, 550 s together, share 596.
    assert command.limit_of("flava", names[1:], 596) == pytest.approx(80 * 596 / 550)
    assert command.limit_of(names[-1], names[-1:], 123) == 123
    assert command.limit_of("demo", names, -1) == 0


def test_limits_name_parts() -> None:
    assert command.limits_of(["demo=20", "parity=.5"]) == {"demo": 20, "parity": 0.5}
    with pytest.raises(ValueError, match="there is no part 'dem': use one of parity, flava"):
        command.limits_of(["dem=20"])


def test_a_missing_package_is_named() -> None:
    assert part.absent({"json": "json", "no_such_module": "no-such-package"}) == ["no-such-package"]


def shell(script: str) -> list[str]:
    """The command of a part that is a script; `tell JSON` tells an event."""
    return ["sh", "-c", f"tell() {{ printf '{part.EVENT}%s\\n' \"$1\"; }}\n{script}"]


@pytest.fixture
def check(tmp_path: Path) -> gpu_check.Check:
    return gpu_check.Check(["parity", "demo"], tmp_path / "check.json", {"minutes": 8})


def written(check: gpu_check.Check) -> dict[str, Any]:
    """What the file says of each part."""
    assert check.file is not None
    return {found["part"]: found for found in json.loads(check.file.read_text())["parts"]}


def test_rows_are_kept_and_told_as_they_come(check: gpu_check.Check, capsys: pytest.CaptureFixture[str]) -> None:
    rows = """tell '{"row": {"batch": 8, "share": 0.40004}}'; echo words; tell '{"row": {}}'"""
    script = f"""tell '{{"machine": "a GPU"}}'; {rows}"""
    check.run("parity", 60, shell(script), {})
    outcome = check.outcomes["parity"]
    assert (outcome.state, outcome.note, outcome.limit) == ("done", "", 60)
    assert outcome.rows == written(check)["parity"]["rows"] == [{"batch": 8, "share": 0.40004}, {}]
    assert check.file is not None
    assert json.loads(check.file.read_text())["machine"] == "a GPU"
    printed = capsys.readouterr().out
    assert "  on a GPU\n  batch 8, share 0.4\n  | words\n" in printed
    assert "\nparity: done, " in printed


def test_the_file_is_complete_after_every_row(check: gpu_check.Check) -> None:
    outcome = check.outcomes["demo"]
    for number in range(3):
        check.hear(outcome, {"row": {"number": number}})
        found = written(check)
        assert [row["number"] for row in found["demo"]["rows"]] == list(range(number + 1))
        assert found["parity"]["state"] == "waiting"


def test_a_part_that_hangs_is_ended_with_what_it_started_and_its_rows_stay(check: gpu_check.Check) -> None:
    """As compilers do that wait for processes of their own."""
    script = """sleep 600 & tell '{"row": {"pid": '$!'}}'; wait"""
    check.run("parity", 2, shell(script), {})
    outcome = check.outcomes["parity"]
    assert (outcome.state, outcome.note) == ("cut short", "not done after its 2 s")
    (row,) = written(check)["parity"]["rows"]
    deadline = time.monotonic() + 120
    while (alive := running(row["pid"])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive
    check.run("demo", 60, shell("exit 0"), {})
    assert check.outcomes["demo"].state == "done"
    assert check.problems == ["parity: cut short (not done after its 2 s)"]


def running(pid: int) -> bool:
    """Whether a process is at work; one that has ended may wait for its parent."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_part_without_time_is_not_begun(check: gpu_check.Check, tmp_path: Path) -> None:
    check.run("demo", 0, shell(f"touch {tmp_path / 'begun'}"), {})
    assert written(check)["demo"]["state"] == "cut short"
    assert not (tmp_path / "begun").exists()


@pytest.mark.parametrize(
    ("script", "note"),
    [
        ("echo Traceback; echo 'ValueError: no'; exit 1", "ValueError: no"),
        ("""tell '{"failed": "ValueError: first line"}'; echo more; exit 1""", "ValueError: first line"),
        ("kill -SEGV $$", "exit status -11, and not a word"),
    ],
)
def test_a_part_that_fails_is_told(script: str, note: str, check: gpu_check.Check) -> None:
    check.run("demo", 60, shell(script), {})
    check.run("parity", 60, shell("exit 0"), {})
    assert (written(check)["demo"]["state"], written(check)["demo"]["note"]) == ("failed", note)
    assert check.problems == [f"demo: failed ({note})"]
    assert check.summary == "FAILED: 1 of 2 parts done; failed: demo"


def test_a_part_that_is_skipped_is_no_fault(check: gpu_check.Check) -> None:
    check.run("parity", 60, shell("exit 0"), {})
    check.run("demo", 60, shell("""tell '{"skipped": "not installed: datasets"}'"""), {})
    assert check.problems == []
    assert check.summary == "passed: 1 of 2 parts done; skipped: demo"


def test_parity_must_be_shown_where_it_is_asked_for(check: gpu_check.Check) -> None:
    check.run("demo", 60, shell("exit 0"), {})
    assert check.problems == ["parity: waiting"]
    assert gpu_check.Check(["demo"], None, {}).problems == []


def test_who_ends_the_check_ends_its_part(check: gpu_check.Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def hear(*_: Any) -> None:
        check.outcomes["demo"].rows.append({})

    def wait(process: subprocess.Popen[str], timeout: float | None = None) -> int:
        if timeout is None:
            return original(process)
        raise KeyboardInterrupt

    original = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        check.run("demo", 300, shell("sleep 300"), {})
    assert time.monotonic() - began < 100  # the script is dead, or waiting for it would take 300 s
    assert written(check)["demo"]["note"] == "the whole check was ended"


def asked(tmp_path: Path) -> part.Asked:
    return part.Asked(CPU, "tiny", tmp_path)


@pytest.mark.parametrize(
    ("error", "status", "event"),
    [
        (None, 0, None),
        (part.SkippedError("not installed: emoji"), 0, {"skipped": "not installed: emoji"}),
        (RuntimeError("CUDA error\nlong advice"), 1, {"failed": "RuntimeError: CUDA error"}),
    ],
)
def test_a_part_tells_its_rows_and_its_end(
    error: Exception | None,
    status: int,
    event: dict[str, str] | None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def rows(_: part.Asked) -> Iterator[measure.Row]:
        yield {"batch": 8}
        if error is not None:
            raise error

    assert part.work(part.Part(1, rows), 600, asked(tmp_path)) == status
    printed = capfd.readouterr()
    told = [json.loads(line[1:]) for line in printed.out.split("\n") if line.startswith(part.EVENT)]
    assert told == [{"machine": measure.machine()}, {"row": {"batch": 8}}, *([event] if event else [])]
    assert ("Traceback" in printed.err) is bool(status)


def test_a_part_that_hangs_says_where(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def waits(_: part.Asked) -> Iterator[measure.Row]:
        deadline = time.monotonic() + 60
        while "in waits" not in (told := capfd.readouterr().out) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield {"told": "in waits" in told}

    limit = time.monotonic() - BEGAN + 0.5
    part.work(part.Part(1, waits), limit, asked(tmp_path))
    assert '{"row": {"told": true}}' in capfd.readouterr().out


def test_float32_is_compared_without_tf32(tmp_path: Path) -> None:
    torch.backends.cudnn.allow_tf32 = True
    part.work(part.Part(1, lambda _: iter(())), 600, asked(tmp_path))
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_batch_that_does_not_fit_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def once(run: Callable[[], object], device: torch.device) -> float:
        _, _, batches = cast(partial[None], run).args
        sizes.append(len(batches[0].target))
        if sizes[-1] == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return 0.5

    monkeypatch.setattr(steps, "BATCHES", {"tiny": (2, 1)})
    monkeypatch.setattr(steps, "once", once)
    monkeypatch.setattr(steps, "count_flop", lambda run: 1000)
    monkeypatch.setattr(steps, "measured", lambda step, dtype, device, repeats, flop: {"GFLOP": flop / 1e9})
    monkeypatch.setattr(steps, "bfloat16_products", lambda: False)
    large, small = steps.step_rows("vilt", False, asked(tmp_path))
    assert sizes == [2, 1]
    same = {"model": "vilt", "dtype": "float32", "mode": "eager"}
    assert large == {**same, "batch": 2, "note": "out of memory"}
    assert small == {**same, "batch": 1, "first s": 0.5, "GFLOP": 1e-6}


def test_bfloat16_is_measured_where_there_are_products_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_steps_of_dtype", lambda model, compiled, asked, dtype: iter([{"dtype": dtype}]))
    for products, dtypes in ((True, [torch.bfloat16, torch.float32]), (False, [torch.float32])):
        monkeypatch.setattr(steps, "bfloat16_products", lambda products=products: products)
        assert [row["dtype"] for row in steps.step_rows("flava", True, asked(tmp_path))] == dtypes


def run_gpu(
    file: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Runs the check, tiny and on the CPU; returns how it ended, and part -> what the file says of it."""
    asked_for = ["--size", "tiny", "--device", "cpu", "--minutes", "60", "--json", str(file), *arguments]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *asked_for],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, {found["part"]: found for found in json.loads(file.read_text())["parts"]}


HIDING = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: None if name in {names!r} else find(name, path, target)
"""


def without(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The environment of a Python in which these modules cannot be imported."""
    (folder / "sitecustomize.py").write_text(HIDING.format(names=set(names)))
    return {"PYTHONPATH": str(folder)}


EAGER = [name for name in command.PARTS if not name.endswith("-compiled")]
"""The parts that need no compiler, which takes minutes for the smallest model on a CPU."""


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """These parts, on a machine without Ray."""
    folder = tmp_path_factory.mktemp("gpu")
    environment = without(folder, ["ray"])
    return run_gpu(folder / "c.json", "--parts", *EAGER, environment=environment)


@pytest.mark.slow
def test_the_check_passes_on_a_cpu(checked: Any) -> None:
    done, parts = checked
    assert {name: found["state"] for name, found in parts.items()} == dict.fromkeys(EAGER, "done"), done.stdout
    assert done.returncode == 0
    assert done.stdout.endswith(f"passed: {len(EAGER)} of {len(EAGER)} parts done\n")
    assert all(0 < found["seconds"] < found["limit"] for found in parts.values())
    for found in parts.values():
        assert measure.markdown(found["rows"]) in done.stdout


@pytest.mark.slow
def test_parity_is_of_different_computations(checked: Any) -> None:
    """Equal to the last digit they would be one; bfloat16 has 8 bits."""
    rows = checked[1]["parity"]["rows"]
    tasks = [
        ("flava_p1_l1", "agnews_text_classification"),
        ("flava_p4_l1", "text_generation"),
        ("flava_p8_l1", "image_generation"),
        ("flava_p8_l1", "text_generation"),
    ]
    for dtype, least, most in (("float32", 1e-8, 1e-4), ("bfloat16", 1e-3, 0.5)):
        judged = [row for row in rows if row["dtype"] == dtype]
        assert sorted((row["case"], row["task"]) for row in judged) == tasks
        for row in judged:
            for name in ("golden: values", "golden: gradients", "cpu: values", "cpu: gradients"):
                assert least < row[name] < most, (row, name)
            assert row["golden: loss"] < most
            assert row["limit"] == ("below" if dtype == "float32" else "told")


@pytest.mark.slow
def test_a_step_is_measured_for_each_batch(checked: Any) -> None:
    dtypes = ["bfloat16", "float32"] if bfloat16_products() else ["float32"]
    for model in ("flava", "vilt"):
        rows = checked[1][model]["rows"]
        assert [(r["model"], r["mode"], r["dtype"], r["batch"]) for r in rows] == [
            (model, "eager", dtype, batch) for dtype in dtypes for batch in (2, 4)
        ]
        for small, large in zip(rows[::2], rows[1::2], strict=True):
            assert large["GFLOP"] == pytest.approx(2 * small["GFLOP"])
            assert min(small["share"], large["share"]) > 0
            assert min(small["peak GB"], large["peak GB"]) > 0.1  # a process with torch


@pytest.mark.slow
def test_a_compiled_step_is_compiled_once_for_all_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as always, and then run as it is: the compiler itself has its test in `models/test_compute.py`."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda part, dynamic: compile_(part, dynamic=dynamic, backend="eager"))
    monkeypatch.setattr(step, "matmul_speed", lambda dtype, device: 1e12)
    monkeypatch.setattr(steps, "bfloat16_products", lambda: False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backbone._compiled.cache_clear()
    graphs = []
    rows = []
    for row in steps.step_rows("vilt", True, asked(tmp_path)):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        rows.append(row)
    backbone._compiled.cache_clear()
    # Attention of three paths and of four, before and after they share blocks, and experts.
    assert graphs == [4, 4]
    assert [(row["mode"], row["batch"]) for row in rows] == [("compiled", 2), ("compiled", 4)]
    assert rows[0]["first s"] > 3 * rows[0]["seconds"]
    assert rows[1]["GFLOP"] == pytest.approx(2 * rows[0]["GFLOP"])


@pytest.mark.slow
def test_a_participation_is_told_by_parts(checked: Any) -> None:
    rows = [row for row in checked[1]["participation"]["rows"] if row["dtype"] == "float32"]
    assert [row["part"] for row in rows] == ["load", "rest", "state", "models", "compute", "data", "encode", "all"]
    *parts, whole = rows
    for column in ("first s", "later s"):
        assert whole[column] == pytest.approx(sum(row[column] for row in parts))
    for column in ("first share", "later share"):
        assert whole[column] == pytest.approx(1)
    assert whole["MB sent"] == pytest.approx(0.5363, abs=1e-4)  # as benchmarks.participation counts it


@pytest.mark.slow
def test_the_demo_has_a_round_of_two_clients(checked: Any) -> None:
    *clients, whole = checked[1]["demo"]["rows"]
    assert len({row["client"] for row in clients}) == 2
    assert all(0 < row["loss"] < 10 and row["replaced"] == 1 for row in clients)  # there is no personal model yet
    assert (whole["client"], whole["task"]) == ("all", "all")
    assert min(whole[name] for name in ("seconds", "peak GB", "MB down", "MB up")) > 0


@pytest.mark.slow
def test_a_graphs_stand_in_has_the_steps_operations(checked: Any) -> None:
    rows = checked[1]["graph"]["rows"]
    modes = [("flava", "eager"), ("flava", "graph: stand-in"), ("vilt", "eager"), ("vilt", "graph: stand-in")]
    assert [(row["model"], row["mode"]) for row in rows] == modes
    for eager, graph in zip(rows[::2], rows[1::2], strict=True):
        assert eager["GFLOP"] == graph["GFLOP"] > 0
        assert min(graph["share"], graph["first s"], graph["peak GB"]) > 0


@pytest.mark.slow
def test_clients_work_one_two_and_four_at_once(checked: Any) -> None:
    rows = checked[1]["at-once"]["rows"]
    assert [row["at once"] for row in rows] == [1, 2, 4]
    assert all(row["a second"] == pytest.approx(4 / row["seconds"]) for row in rows)


@pytest.mark.slow
def test_the_loader_tells_images_a_second(checked: Any) -> None:
    rows = checked[1]["loader"]["rows"]
    assert {row["side"] for row in rows} == {64}
    assert rows[0]["workers"] == 0
    assert all(min(row["images/s"], row["later images/s"]) > 0 for row in rows)


@pytest.mark.slow
def test_one_seed_gives_one_participation(checked: Any) -> None:
    rows = checked[1]["deterministic"]["rows"]
    found = [(row["pattern"], row["deterministic"], row["apart"]) for row in rows]
    assert found == [(7, "true", 0), (7, "false", 0), (8, "true", 0), (8, "false", 0)]  # on a processor, always


def test_participations_that_differ_with_the_option_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.0, 1.0, 1.25])
    monkeypatch.setattr(clients, "client", lambda *_, **__: SimpleNamespace(settings=HyperParameters()))
    monkeypatch.setattr(clients, "_trained", lambda local: {"w": torch.tensor([next(values)])})
    rows = clients.deterministic_rows(asked(tmp_path))
    assert next(rows)["apart"] == 0.25
    with pytest.raises(ArithmeticError, match=r"two participations of pattern 7 with one seed are 0.25 apart"):
        next(rows)


def test_what_a_graph_cannot_hold_is_told_and_the_next_model_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def captured(step: steps.StaticStep, device: torch.device) -> steps.StaticStep:
        raise RuntimeError("operation not permitted when stream is capturing\nlong advice")

    monkeypatch.setattr(steps, "captured", captured)
    monkeypatch.setattr(steps, "count_flop", lambda run: 1000)
    monkeypatch.setattr(steps, "measured", lambda step, dtype, device, repeats, flop: {"GFLOP": flop / 1e9})
    rows = list(steps.graph_rows(asked(tmp_path)))
    assert [row.get("note") for row in rows] == [None, "operation not permitted when stream is capturing"] * 2
    assert [row["model"] for row in rows] == ["flava", "flava", "vilt", "vilt"]


def test_a_static_step_is_a_step_of_the_training_loop() -> None:
    """Its tensors move as `core.training.train` moves them, whose optimiser is as new."""
    states = []
    for static in (True, False):
        torch.manual_seed(0)
        local = workload.client("vilt", "tiny", 0, 2, 8)
        net, batches = local.model(), step.batches_of(local, 2)
        torch.manual_seed(1)
        run = steps.StaticStep(local, net, batches) if static else partial(step.steps, local, net, batches)
        run()
        states.append([p.detach() for p in net.parameters() if p.requires_grad])
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def broken_golden(tmp_path: Path) -> Path:
    """The smallest golden case, with one trained tensor of the model half as large."""
    folder = tmp_path / "golden"
    for name in ("flava_p1_l1", "backbones"):
        shutil.copytree(parity.GOLDEN / name, folder / name)
    file = folder / "flava_p1_l1" / "client_state.safetensors"
    state = load_file(file)
    name = "encoders.text.proj.weight"
    save_file({**state, name: state[name] / 2}, file)
    return folder


@pytest.mark.slow
def test_a_broken_model_fails(broken_golden: Path, tmp_path: Path) -> None:
    """And nothing but parity: the part after it runs."""
    done, parts = run_gpu(tmp_path / "c.json", "--golden", str(broken_golden), "--parts", "parity", "participation")
    assert done.returncode == 1
    assert parts["participation"]["state"] == "done"
    assert parts["parity"]["state"] == "failed"
    expected = (
        "ArithmeticError: 3 deviations: flava_p1_l1: task 'agnews_text_classification': golden: values deviates by"
    )
    assert parts["parity"]["note"].startswith(expected)
    row = parts["parity"]["rows"][0]
    assert row["limit"] == "NOT BELOW"
    assert row["golden: values"] > 0.01
    assert max(row["cpu: values"], row["cpu: gradients"]) < 1e-4  # both are broken alike
    assert done.stdout.endswith("FAILED: 1 of 2 parts done; failed: parity\n")


@pytest.mark.slow
def test_a_part_that_takes_too_long_leaves_the_others_alone(tmp_path: Path) -> None:
    """Each of the two rows of `flava` has two seconds of matrix products alone."""
    parts_asked = ["--parts", "flava", "vilt", "participation"]
    done, parts = run_gpu(tmp_path / "c.json", "--limit", "flava=4", "--limit", "vilt=0", *parts_asked)
    assert {name: found["state"] for name, found in parts.items()} == {
        "flava": "cut short",
        "vilt": "cut short",
        "participation": "done",
    }
    assert parts["flava"]["note"] == "not done after its 4 s"
    assert parts["vilt"]["seconds"] < 1
    assert done.returncode == 0
    assert done.stdout.endswith("passed: 1 of 3 parts done; cut short: flava, vilt\n")


@pytest.mark.slow
def test_a_handful_of_packages_is_enough(tmp_path: Path) -> None:
    """torch, transformers, OmegaConf, Rich and what these need: none of the project's other dependencies, nor pytest."""
    data = ["datasets", "easy_vqa", "sklearn", "emoji", "pyarrow", "pandas"]
    others = ["flwr", "ray", "scipy", "psutil", "PIL", "pytest", "hypothesis", "gradio", "mlflow", "wandb"]
    environment = without(tmp_path, [*data, *others])
    python = [sys.executable, "-c", "import datasets"]
    assert subprocess.run(python, env={**os.environ, **environment}, capture_output=True, check=False).returncode
    done, parts = run_gpu(tmp_path / "c.json", "--parts", "vilt", "participation", "demo", environment=environment)
    assert {name: part["state"] for name, part in parts.items()} == {
        "vilt": "done",
        "participation": "done",
        "demo": "skipped",
    }, done.stdout
    assert parts["demo"]["note"] == "not installed: flwr, datasets, pillow, easy-vqa, scikit-learn, emoji"
    assert done.returncode == 0
