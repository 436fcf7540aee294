"""What presets are made of: clients from patterns.

Patterns describe some clients once, and each of several groups gets all of them. A group's share of a data set is
n // groups rows, the last group's the remainder too; a client takes a slice of its group's share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tap_flower.data.fields import check_keys
from tap_flower.data.spec import SPLITS
from tap_flower.errors import SpecError
from tap_flower.plain import shown

_REST = "rest"


@dataclass(frozen=True)
class SharedSet:
    """A data set of a preset.

    Attributes:
        name: its id on the hub, or the name of one of the packaged data sets.
        rows: how many rows of the split the groups share.
        format: `hub` or `packaged`.
        config: where the hub has several.
        revision: commit, tag or branch on the hub.
    """

    name: str
    rows: int
    format: str = "hub"
    config: str | None = None
    revision: str | None = None


def expand(
    patterns: Sequence[Mapping[str, Any]], groups: int, data_sets: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Client specs, as nested mappings: the patterns for the first group, then for the second, and so on.

    Args:
        patterns: each a mapping with `tasks` as in a client spec, whose sources say `data: KEY` in place of a format, and
            `share: [from, to]` (fractions of the group's share) or `share: rest` (what no group has) in place of rows. A
            source that says its format is taken as it is.
        groups: how many.
        data_sets: key -> `SharedSet`.

    Raises:
        SpecError: a key is unknown, or a value is wrong.
    """
    sets = {}
    for key, values in data_sets.items():
        check_keys(values, SharedSet, f"data set {shown(key)}")
        sets[key] = SharedSet(**values)
        if not isinstance(sets[key].rows, int) or sets[key].rows < 1:
            raise SpecError(f"data set {shown(key)} has rows {shown(sets[key].rows)}: give their number")
        if sets[key].format not in ("hub", "packaged"):
            raise SpecError(f"data set {shown(key)} has format {shown(sets[key].format)}: use hub or packaged")
    for group in range(groups):
        for number, pattern in enumerate(patterns):
            if not isinstance(pattern, Mapping) or not isinstance(pattern.get("tasks"), list):
                raise SpecError(f"pattern {number} has no tasks: list at least one under `tasks`")
            if "name" in pattern:
                raise SpecError(
                    f"pattern {number} has the name {shown(pattern['name'])}, and its clients are named client-0 and so on: "
                    f"leave it out"
                )
            tasks = []
            for task in pattern["tasks"]:
                if not isinstance(task, Mapping):
                    raise SpecError(f"pattern {number} has the task {shown(task)}: write `key: value` lines")
                where = f"pattern {number}: task {shown(task.get('name', '?'))}"
                sources = {
                    split: [
                        _source(source, sets, group, groups, f"{where}: {split}")
                        for source in _listed(task[split], f"{where}: {split}")
                    ]
                    for split in SPLITS
                    if task.get(split)
                }
                tasks.append({**task, **sources})
            yield {**pattern, "name": f"client-{group * len(patterns) + number}", "tasks": tasks}


def _listed(sources: Any, where: str) -> Sequence[Mapping[str, Any]]:
    listed = [sources] if isinstance(sources, Mapping) else sources
    if not isinstance(listed, list) or not all(isinstance(source, Mapping) for source in listed):
        raise SpecError(f"{where} is {shown(sources)}: give a source or a list of them")
    return listed


def _source(
    values: Mapping[str, Any], sets: Mapping[str, SharedSet], group: int, groups: int, where: str
) -> dict[str, Any]:
    if "format" in values:
        if "data" in values:
            raise SpecError(
                f"{where} has data {shown(values['data'])} and format {shown(values['format'])}: give one of the two"
            )
        return dict(values)
    if values.get("data") not in list(sets):
        raise SpecError(f"{where} has data {shown(values.get('data'))}: use one of {', '.join(map(str, sets))}")
    data = sets[values["data"]]
    found = {key: value for key, value in values.items() if key not in ("data", "share")}
    found |= {"format": data.format, "name": data.name}
    if data.format == "hub":
        found |= {"config": data.config, "revision": data.revision}
    share = values.get("share")
    if share is not None and "rows" in values:
        raise SpecError(f"{where} has share {shown(share)} and rows {shown(values['rows'])}: give one of the two")
    if share == _REST:
        found["rows"] = [data.rows, None]
    elif share is not None:
        if not _is_part(share):
            raise SpecError(f"{where} has share {shown(share)}: give [from, to], two fractions, or {_REST}")
        found["rows"] = list(_slice(data.rows, group, groups, *share))
    return found


def _is_part(share: Any) -> bool:
    if not isinstance(share, list) or len(share) != 2 or not all(isinstance(end, int | float) for end in share):
        return False
    return bool(0 <= share[0] < share[1] <= 1)


def _slice(rows: int, group: int, groups: int, start: float, stop: float) -> tuple[int, int]:
    """First row and the row after the last of a slice of a group's share."""
    size = rows // groups
    first = group * size
    if group == groups - 1:
        size = rows - first
    return first + int(start * size), first + int(stop * size)
