"""From Flower's run configuration to a strategy: a new run, or one that is resumed."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid

from tap_flower.config import Config, ConfigError, plain, to_yaml
from tap_flower.federation import checkpoint
from tap_flower.federation.checkpoint import Progress
from tap_flower.federation.roster import Roster
from tap_flower.federation.run_config import simulated_run
from tap_flower.federation.strategy import TapStrategy
from tap_flower.methods.registry import find_method
from tap_flower.storage import write_atomically


def run(grid: Grid, context: Context) -> None:
    """The ServerApp's main: a whole run. A failure is written to `metrics.jsonl` before it ends the run."""
    logging.basicConfig(level=logging.WARNING)
    config, folder = simulated_run(context)
    strategy = prepare(config, folder, resume=bool(context.run_config.get("resume", False)))
    try:
        strategy.start(grid)
    except Exception as error:
        problem = "; ".join([str(error), *getattr(error, "__notes__", [])])
        strategy.events.write("failed", round=strategy.progress.round, problem=problem, type=type(error).__name__)
        raise


def prepare(config: Config, folder: Path, resume: bool = False) -> TapStrategy:
    """A strategy for a new run, or for one that goes on from its last complete round.

    Args:
        config: of the run; a resumed run must have been started with the same one.
        folder: the run folder; a new run's must not hold another run.
        resume: whether to go on.

    Raises:
        ConfigError: the folder holds another run, the configuration differs from the one to be resumed, or there is no
            such method.
        StorageError: the run folder cannot be read or written.
    """
    find_method(config.method)
    server = folder / "server"
    if resume:
        progress, tensors, best = checkpoint.load(server)
        if different := _differences(progress.config, plain(config)):
            raise ConfigError(
                f"{folder} was started with another configuration ({', '.join(different)} differ): resume it with the "
                f"same preset, file and settings"
            )
        roster = Roster(config.seed, tensors, best, progress.holds, progress.changed)
        return TapStrategy(config, folder, progress, roster)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: give another folder with `--out`, or go on with `--resume`")
    write_atomically(folder / "config.yaml", to_yaml(config).encode())
    return TapStrategy(config, folder, Progress(uuid.uuid4().hex, plain(config)), Roster(config.seed))


def _differences(old: dict[str, object], new: dict[str, object]) -> list[str]:
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
