"""A memory of what was used last, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values by key, up to a number of bytes; beyond it, what was not used for longest is forgotten.

    Args:
        limit: in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key) -> Value | None:
        """The value of a key, which is used by that; None where it is not, or no longer, known."""
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: Key, value: Value, size: int) -> None:
        """Keeps a value of `size` bytes in place of the key's old one."""
        _, old = self._values.pop(key, (None, 0))
        self._values[key] = value, size
        self.size += size - old
        while self.size > self.limit:
            _, (_, freed) = self._values.popitem(last=False)
            self.size -= freed
