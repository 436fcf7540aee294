"""What a module was found to consist of, kept for a run: to try every task again takes as long as three steps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from tap_flower.core.components import ComponentMap, Pair
from tap_flower.core.module_tensors import BuiltModule
from tap_flower.core.tracing import Parts
from tap_flower.errors import StorageError
from tap_flower.files import read_json, write_json

PARTS = "parts.json"


class _Record(Struct, frozen=True, forbid_unknown_fields=True):
    run: str
    form: str
    component_of: dict[str, str]
    reach: dict[str, list[str]]
    moving: list[str]
    local: list[str]


@dataclass(frozen=True)
class KnownParts:
    """The file `parts.json` in the state folder of a client: what its module consists of in a run.

    An app does not change within a run. A run that is resumed begins with `query.manifest` again, and that tries every
    task anew. A file that is missing, damaged, or of a module of another form is as good as none.

    Args:
        folder: the client's state folder in the run.
        run: identity of the run.
        anew: whether what is kept does not count.
    """

    folder: Path
    run: str
    anew: bool

    def parts(self, built: BuiltModule, pairs: Sequence[Pair], given: object, trace: Callable[[], Parts]) -> Parts:
        """What is kept of a module of this form, or else what `trace` finds, which is kept then.

        Args:
            built: the module.
            pairs: of the client.
            given: what the client says of its components, compared by its `repr`.
            trace: tries every task.
        """
        shapes = [(name, tuple(value.shape)) for name, value in built.values.items()]
        form = hashlib.sha256(repr((built.trainable, shapes, pairs, given)).encode()).hexdigest()
        if (kept := self._kept()) is not None and kept.form == form:
            reach = {pair: frozenset(kept.reach[pair.task]) for pair in pairs}
            return Parts(ComponentMap(kept.component_of, reach), frozenset(kept.moving), frozenset(kept.local))
        found = trace()
        component_map = found.component_map
        reached = {pair.task: sorted(components) for pair, components in component_map.reach.items()}
        component_of, moving, local = dict(component_map.component_of), sorted(found.moving), sorted(found.local)
        record = _Record(self.run, form, component_of, reached, moving, local)
        write_json(self.folder / PARTS, msgspec.to_builtins(record), durable=False)
        return found

    def _kept(self) -> _Record | None:
        if self.anew or not (self.folder / PARTS).exists():
            return None
        try:
            record = msgspec.convert(read_json(self.folder / PARTS), _Record)
        except (StorageError, msgspec.ValidationError):
            return None
        return record if record.run == self.run else None
