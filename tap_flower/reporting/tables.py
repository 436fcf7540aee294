"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from tap_flower.reporting.results import headline

MODELS = ("server", "server+finetune", "personal", "tap")


def results_table(found: Mapping[str, Any]) -> Table:
    """Task × model: the mean over the clients of each task's headline metric, the best one in bold."""
    title = f"{found['method']} on {found['preset']}, {found['rounds']} rounds, seed {found['seed']}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    present = {model for by_model in found["tasks"].values() for model in by_model}
    models = [m for m in MODELS if m in present] + sorted(present - set(MODELS))
    for name in ("task", "metric"):
        table.add_column(name)
    for model in models:
        table.add_column(model.replace("+", "\n+"), justify="right")
    table.add_column("replaced", justify="right")
    for task, by_model in found["tasks"].items():
        metric, higher = headline(found["kinds"][task])
        values = [by_model.get(model, {}).get(metric) for model in models]
        there = [v for v in values if v is not None]
        best = (max if higher else min)(there)
        cells = ["" if v is None else f"[bold]{v:.3f}[/bold]" if v == best else f"{v:.3f}" for v in values]
        replaced = sum(counts.get(task, 0) for counts in found["replacements"].values())
        table.add_row(task, metric + (" ↑" if higher else " ↓"), *cells, str(replaced))
    megabytes = {way: found["bytes"][way] / 1e6 for way in ("down", "up")}
    table.caption = (
        f"means over clients, on test data; {megabytes['down']:.1f} MB sent to clients, {megabytes['up']:.1f} MB back"
    )
    return table
