"""`python -m tap_flower.sweeps.worker`: one run of a sweep in one process, with the apps that Flower would start."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from tap_flower.config import client_specs, load_config
from tap_flower.federation import server
from tap_flower.federation.in_process import InProcessGrid
from tap_flower.simulation import app_folder


def client_app() -> ClientApp:
    """The ClientApp, which a wheel holds in a folder of the package, where no import finds it by itself."""
    sys.path.insert(0, str(app_folder()))
    from client_app.app import app

    return app


def run(preset: str, config: str, settings: str, out: Path, resume: bool = False) -> None:
    """A whole run; the server's main and the clients' handlers are those of every other run.

    Args:
        preset: name of a preset.
        config: path of a YAML file, or nothing.
        settings: `key=value`, with spaces between them.
        out: the run folder.
        resume: whether to go on with the run in that folder.
    """
    run_config: dict[str, bool | float | int | str]
    run_config = {"preset": preset, "config": config, "set": settings, "out": str(out), "resume": resume}
    clients = len(client_specs(load_config(preset, config, settings.split())))
    grid = InProcessGrid(client_app(), [{"partition-id": number} for number in range(clients)], run_config)
    server.run(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run_config))


def main() -> None:
    """The command that `execute` starts."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--preset", required=True)
    options.add_argument("--config", default="")
    options.add_argument("--set", default="")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--resume", action="store_true")
    given = options.parse_args()
    run(given.preset, given.config, given.set, given.out, given.resume)


if __name__ == "__main__":
    main()
