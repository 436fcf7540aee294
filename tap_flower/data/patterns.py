"""Clients from patterns: a preset describes some clients once, and each of several groups gets all of them.

A group's share of a data set is n // groups rows, the last group's the remainder too; a client takes a slice of its
group's share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tap_flower.data.spec import SpecError, check_keys

_REST = "rest"
_SOURCES = ("train", "validation", "test")


@dataclass(frozen=True)
class HubSet:
    """A data set of a preset.

    Attributes:
        name: its id on the hub.
        rows: how many rows of the split the groups share.
        config: where it has several.
        revision: commit, tag or branch.
    """

    name: str
    rows: int
    config: str | None = None
    revision: str | None = None


def expand(
    patterns: Sequence[Mapping[str, Any]], groups: int, data_sets: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Client specs, as nested mappings: the patterns for the first group, then for the second, and so on.

    Args:
        patterns: each a mapping with `tasks` as in a client spec, whose sources say `data: KEY` in place of a format, and
            `share: [from, to]` (fractions of the group's share) or `share: rest` (what no group has) in place of rows.
        groups: how many.
        data_sets: key -> `HubSet`.

    Raises:
        SpecError: a key is unknown, or a value is wrong.
    """
    sets = {}
    for key, values in data_sets.items():
        check_keys(values, HubSet, f"data set {key!r}")
        sets[key] = HubSet(**values)
    for group in range(groups):
        for number, pattern in enumerate(patterns):
            tasks = []
            for task in pattern["tasks"]:
                where = f"pattern {number}: task {task.get('name', '?')!r}"
                sources = {
                    split: [
                        _source(source, sets, group, groups, f"{where}: {split}") for source in _listed(task[split])
                    ]
                    for split in _SOURCES
                    if task.get(split)
                }
                tasks.append({**task, **sources})
            yield {**pattern, "name": f"client-{group * len(patterns) + number}", "tasks": tasks}


def _listed(sources: Any) -> Sequence[Mapping[str, Any]]:
    return [sources] if isinstance(sources, Mapping) else sources


def _source(
    values: Mapping[str, Any], sets: Mapping[str, HubSet], group: int, groups: int, where: str
) -> dict[str, Any]:
    if values.get("data") not in sets:
        raise SpecError(f"{where} has data {values.get('data')!r}: use one of {', '.join(sets)}")
    data = sets[values["data"]]
    found = {key: value for key, value in values.items() if key not in ("data", "share")}
    found |= {"format": "hub", "name": data.name, "config": data.config, "revision": data.revision}
    share = values.get("share")
    if share == _REST:
        found["rows"] = [data.rows, None]
    elif share is not None:
        found["rows"] = list(_slice(data.rows, group, groups, *share))
    return found


def _slice(rows: int, group: int, groups: int, start: float, stop: float) -> tuple[int, int]:
    """First row and the row after the last of a slice of a group's share."""
    size = rows // groups
    first = group * size
    if group == groups - 1:
        size = rows - first
    return first + int(start * size), first + int(stop * size)
