"""The ServerApp's main: from Flower's run configuration to a run."""

from __future__ import annotations

import logging

from flwr.app import Context
from flwr.serverapp import Grid

from tap_flower.config import simulated_run
from tap_flower.server.strategy import TapStrategy


def run(grid: Grid, context: Context) -> None:
    """The ServerApp's main: a whole run. A failure is written to `metrics.jsonl` before it ends the run."""
    logging.basicConfig(level=logging.WARNING)
    config, folder = simulated_run(context.run_config, context.run_id)
    strategy = TapStrategy(config, folder, resume=bool(context.run_config.get("resume", False)))
    try:
        strategy.start(grid)
    except Exception as error:
        problem = "; ".join([str(error), *getattr(error, "__notes__", [])])
        strategy.events.write("failed", round=strategy.progress.round, problem=problem, type=type(error).__name__)
        raise
