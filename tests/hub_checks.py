"""The checks of `flwr app publish` that need no network."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from flwr.cli.build import build_fab_from_files
from flwr.cli.config_utils import load_and_validate
from flwr.cli.utils import collect_files

_publish: Any = importlib.import_module("flwr.cli.app_cmd.publish")  # in the package, the name is the command's


def check_for_the_hub(folder: Path) -> None:
    """Asserts that Flower would take an app: its name, description, files, licence, and a bundle of format 1.

    Raises:
        click.ClickException: a check of `flwr app publish` fails.
        ValueError: a check of `flwr build` fails.
    """
    config, warnings = load_and_validate(folder / "pyproject.toml", check_module=False)
    assert warnings == []
    _publish._validate_app_name(folder.name, "the folder")
    _publish._validate_description(config["project"]["description"])
    _publish._validate_files(_publish._collect_file_paths(folder))
    _, metadata = build_fab_from_files(collect_files(folder))
    assert metadata.fab_format_version == 1
    assert (metadata.flwr_version_min, metadata.flwr_version_target) == ("1.41", "1.42.0")
