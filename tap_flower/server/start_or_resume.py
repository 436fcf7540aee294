"""How a run begins: anew, or from its last complete round."""

from __future__ import annotations

import uuid
from pathlib import Path

from tap_flower.config import Config, plain, to_yaml
from tap_flower.errors import ConfigError
from tap_flower.files import StorageError, write_atomically
from tap_flower.methods.registry import find_method
from tap_flower.server import checkpoint
from tap_flower.server.checkpoint import Progress
from tap_flower.server.roster import Roster


def new_run(config: Config, folder: Path) -> tuple[Progress, Roster]:
    """A new run. Its folder stays empty, so that a run which cannot begin after all is not in the way of the next.

    Raises:
        ConfigError: the folder holds another run, or there is no such method.
        StorageError: the folder cannot be made.
    """
    find_method(config.method)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: give another folder with `--out`, or go on with `--resume`")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the run folder {folder} cannot be made: {error.strerror}") from error
    return Progress(uuid.uuid4().hex, plain(config)), Roster(config.seed)


def record_config(config: Config, folder: Path) -> None:
    """Writes a new run's configuration to its folder.

    Raises:
        StorageError: the folder cannot be written.
    """
    write_atomically(folder / "config.yaml", to_yaml(config).encode())


def resumed_run(config: Config, folder: Path) -> tuple[Progress, Roster]:
    """A run as of its last complete round.

    Raises:
        ConfigError: it was started with another configuration, or with a method that this version has not.
        StorageError: its checkpoint cannot be read.
    """
    find_method(config.method)
    progress, tensors, best = checkpoint.load(folder / "server")
    if different := _differences(progress.config, plain(config)):
        raise ConfigError(
            f"{folder} was started with another configuration ({', '.join(different)} differ): resume it with the "
            f"same preset, file and settings"
        )
    return progress, Roster(config.seed, tensors, best, progress.holds, progress.changed)


def _differences(old: dict[str, object], new: dict[str, object]) -> list[str]:
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
