"""The command `tap-flower`; each module holds a group of its commands.

A command imports what it needs when it runs, so that `tap-flower --help` does not wait for torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import typer
from rich.console import Console
from rich.markup import escape

from tap_flower.cli import check, fetch, init, predict, restore, simulate, study_commands, sweep
from tap_flower.errors import TapFlowerError

app = typer.Typer(
    help="Train personal models by federated learning over clients with different tasks and modalities (TAP).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# In the order in which somebody uses them: `tap-flower --help` keeps it.
_PANELS: Mapping[str, Mapping[str, Callable[..., None]]] = {
    "Simulate": {
        "presets": simulate.presets_command,
        "fetch": fetch.fetch_command,
        "simulate": simulate.simulate_command,
        "report": simulate.report_command,
    },
    "Use the models": {
        "predict": predict.predict_command,
        "export": predict.export_command,
        "demo": predict.demo_command,
    },
    "Compare": {"sweep": sweep.sweep_command},
    "Deploy": {
        "init": init.init_command,
        "check": check.check_command,
        "node": check.node_command,
        "restore": restore.restore_command,
    },
}
for panel, commands in _PANELS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)
app.add_typer(study_commands.study_app, name="study", rich_help_panel="Compare")


def main() -> None:
    """Runs the command; prints an expected error as one line on standard error and exits with 1."""
    for library in ("HUB", "DATASETS"):
        os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except TapFlowerError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
