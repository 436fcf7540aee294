"""The clients of a preset, tested on training rows that no client has: for choices, which must not be made on test rows.

    python -m benchmarks.tuning_clients FILE [--preset thirty] [--rows 100] [--without-validation]

writes a file for `simulate --config`, or for `config` of a sweep.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from tap_flower.config import presets, read_yaml

KEYS = "patterns", "groups", "datasets"


def tuning_clients(preset: str, rows: int, validation: bool = True) -> dict[str, Any]:
    """The preset's patterns, groups and data sets, with other test rows.

    Args:
        preset: `demo` or `thirty`.
        rows: test rows of each task, at most.
        validation: whether tasks keep their validation rows; without them, runs that decide on held-out rows set a fifth of
            the training rows aside.
    """
    values = read_yaml(presets()[preset])
    for pattern in values["patterns"]:
        for task in pattern["tasks"]:
            data = values["datasets"][task["train"]["data"]]
            source = {"format": data["format"], "name": data["name"], "split": "train", "shuffle": True}
            if not validation:
                del task["validation"]
            task["test"] = source | {"rows": [data["rows"], data["rows"] + rows]}  # the groups share those before
    return {key: values[key] for key in KEYS}


def main() -> None:
    """Writes the file."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("file", type=Path, help="YAML to write")
    options.add_argument("--preset", default="thirty", choices=["demo", "thirty"])
    options.add_argument("--rows", type=int, default=100, help="test rows of each task, at most (default: %(default)s)")
    options.add_argument("--without-validation", action="store_true", help="leave out the tasks' validation rows")
    given = options.parse_args()
    values = tuning_clients(given.preset, given.rows, not given.without_validation)
    given.file.write_text(yaml.safe_dump(values, sort_keys=False))


if __name__ == "__main__":
    main()
