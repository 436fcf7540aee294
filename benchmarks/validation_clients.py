"""The demo's clients, tested on validation rows: for choices, which must not be made on test rows.

    python -m benchmarks.validation_clients FILE

writes a file for `simulate --config`, or for `config` of a sweep. A task is tested on at most 200 validation rows that no
client uses for the same task otherwise, as evidence for a replacement.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from tap_flower.config import presets, read_yaml
from tap_flower.data import packaged


def validation_clients() -> list[dict[str, Any]]:
    """Client specs."""
    clients: list[dict[str, Any]] = read_yaml(presets()["demo"])["clients"]
    tasks = [task for client in clients for task in client["tasks"]]
    for task in tasks:
        source = task["validation"]
        first = max(other["validation"]["rows"][1] for other in tasks if other["name"] == task["name"])
        last = min(first + 200, len(packaged.load(source["name"], source["split"])))
        task["test"] = source | {"rows": [first, last]}
    return clients


def main() -> None:
    """Writes the file."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("file", type=Path, help="YAML to write")
    options.parse_args().file.write_text(yaml.safe_dump({"clients": validation_clients()}, sort_keys=False))


if __name__ == "__main__":
    main()
