"""One run of a sweep as a Ray task: strategy and ClientApp are those of any other run, here in one process."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

KEPT = "config.yaml", "metrics.jsonl", "results.json"
"""What is sent back of a run folder."""


class Task(NamedTuple):
    """What a process must know of a run.

    Attributes:
        preset: name of its preset.
        config: its whole configuration, in YAML.
        folder: the run folder.
        log: the run's log, beside its folder.
        mark: a text that the log has where this machine has the sweep's folder, too.
        here: the working directory, from which relative paths count.
        threads: that PyTorch uses.
        start: folder of a finished run whose last values of the server are the first ones of this run, or nothing.
        rounds: of stage 1; None are the configuration's.
    """

    preset: str
    config: str
    folder: str
    log: str
    mark: str
    here: str
    threads: int
    start: str = ""
    rounds: int | None = None


def run_task(task: Task) -> tuple[float, str, dict[str, bytes]]:
    """A run from its beginning, or from its last complete round.

    Args:
        task: the run.

    Returns:
        The seconds that it took, why it failed (or nothing), and the files that the sweep's machine does not have: name in
        the run folder -> content, and the log under "".
    """
    began, folder, log = time.monotonic(), Path(task.folder), Path(task.log)
    if Path(task.here).is_dir():
        os.chdir(task.here)
    shared = log.exists() and task.mark.encode() in log.read_bytes()
    if not shared:
        _own_folder(task).mkdir(exist_ok=True)
        folder, log = _own_folder(task) / "run", _own_folder(task) / "run.log"
    with _output_to(log):
        problem = _run(task, folder)
    if shared:
        return time.monotonic() - began, problem, {}
    files = {name: (folder / name).read_bytes() for name in KEPT if not problem and (folder / name).exists()}
    files[""] = log.read_bytes()
    shutil.rmtree(folder.parent)
    return time.monotonic() - began, problem, files


def _own_folder(task: Task) -> Path:
    """Where a run is on a machine without the sweep's folder, also after its process was killed there."""
    name = hashlib.sha256(task.mark.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"tap-flower-{name}"


def _run(task: Task, folder: Path) -> str:
    import torch

    from tap_flower.client.app import spec_client_app
    from tap_flower.config import load_config
    from tap_flower.run.in_process import InProcessGrid
    from tap_flower.server.checkpoint import has_begun
    from tap_flower.server.server_run import final_values
    from tap_flower.server.strategy import TapStrategy

    torch.set_num_threads(task.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    resume = has_begun(folder)
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "config.yaml"
        file.write_text(task.config, encoding="utf-8")
        run_config = {"preset": task.preset, "config": str(file), "set": "", "out": str(folder), "resume": resume}
        try:
            config = load_config(task.preset, str(file))
            nodes = [{"partition-id": number} for number in range(len(config.clients))]
            grid = InProcessGrid(spec_client_app(), nodes, run_config)
            first = final_values(Path(task.start)) if task.start else None
            TapStrategy(config=config, run_folder=folder, resume=resume).start(grid, first, task.rounds)
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
    return ""


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Adds what this process prints to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    with log.open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, original in zip((1, 2), before, strict=True):
            os.dup2(original, stream)
            os.close(original)
