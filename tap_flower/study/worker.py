"""One run of a sweep in one process, with the strategy and the ClientApp that Flower's own processes would have.

Importing this module imports all that a run needs, so that a process which is forked after it begins at once.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

import tap_flower.client.from_spec
import tap_flower.client.handlers  # noqa: F401
from tap_flower.client.app import spec_client_app
from tap_flower.run.in_process import InProcessGrid
from tap_flower.server.strategy import TapStrategy
from tap_flower.study.plan import PlannedRun


def run_alone(planned: PlannedRun, resume: bool, log: Path, threads: int) -> None:
    """A whole run in a process that does nothing else.

    Args:
        planned: the run.
        resume: whether to go on with what is in its folder.
        log: a file that what the run prints is added to.
        threads: that PyTorch uses; where it was imported before the fork, it does not read the environment any more.
    """
    torch.set_num_threads(threads)
    with log.open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    folder, settings = planned.folder.resolve(), " ".join(planned.settings)
    run_config = {
        "preset": planned.preset,
        "config": planned.config,
        "set": settings,
        "out": str(folder),
        "resume": resume,
    }
    config = planned.resolved
    nodes = [{"partition-id": number} for number in range(len(config.clients))]
    grid = InProcessGrid(spec_client_app(), nodes, run_config)
    TapStrategy(config=config, run_folder=folder, resume=resume).start(grid)
