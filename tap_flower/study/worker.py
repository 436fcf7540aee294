"""A run of a sweep in one process, with the same ServerApp and ClientApp as under Flower.

Importing this module imports all that a run needs, so that a process which is forked after it begins at once.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from flwr.app import Context, RecordDict

from tap_flower.client import evaluation as spec_client
from tap_flower.client.app import app_over
from tap_flower.config import simulated_clients
from tap_flower.run.in_process import InProcessGrid
from tap_flower.server import main as server
from tap_flower.study.plan import PlannedRun


def run_alone(planned: PlannedRun, resume: bool, log: Path, threads: int) -> None:
    """Executes a run in a process that does nothing else.

    Args:
        planned: the run.
        resume: whether to resume the run in its folder.
        log: a file to which everything that the run prints is added.
        threads: PyTorch's threads; a PyTorch that was imported before the fork does not read the environment any more.
    """
    torch.set_num_threads(threads)
    with log.open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    run(planned, resume)


def run(planned: PlannedRun, resume: bool) -> None:
    """Executes a whole run in this process; `resume` goes on with the one in its folder."""
    run_config: dict[str, bool | float | int | str] = {
        "preset": planned.preset,
        "config": planned.config,
        "set": " ".join(planned.settings),
        "out": str(planned.folder.resolve()),
        "resume": resume,
    }
    app = app_over(lambda: spec_client.HANDLERS)
    grid = InProcessGrid(
        app, [{"partition-id": number} for number in range(len(simulated_clients(run_config)))], run_config
    )
    server.run(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run_config))
