"""What the clients of a preset read, and how to get it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from tap_flower.data.presets import CATALOGUE, fetch_command
from tap_flower.data.spec import ClientSpec, Source


def needs(specs: Sequence[ClientSpec]) -> tuple[Table, list[str]]:
    """What clients read: a table of backbones and data sets, and the commands that fetch those that must be downloaded."""
    table = Table("backbone or data set", "split", "training rows", "licence", "MB")
    commands: dict[str, None] = {}

    def add(name: str, split: str, rows: str, command: str) -> None:
        facts = CATALOGUE.get(name)
        if facts:
            commands[command] = None
            table.add_row(name, split, rows, facts.licence, str(facts.megabytes or "?"))
        else:
            table.add_row(name, split, rows, "comes with a pip package", "")

    for backbone, revision in sorted({(spec.backbone, spec.revision) for spec in specs}):
        add(backbone, "", "", fetch_command(backbone, revision, is_model=True))
    counts: Counter[Source] = Counter()
    for source in (source for spec in specs for task in spec.tasks for source in task.train):
        start, stop = source.rows or (0, None)
        counts[source.place] += (stop or start) - start
    for source, count in counts.items():
        split = f"{source.config} {source.split}" if source.config else source.split
        add(source.name, split, f"{count:,}" if count else "all", fetch_command(source.name, source.revision))
    return table, list(commands)
