"""Files that survive a crash: every write goes to a temporary file first, which is then renamed. No pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tap_flower.errors import StorageError
from tap_flower.plain import parse_json, shown

_RECORD, _CHECKSUM = "tap_flower", "sha256"
T = TypeVar("T")
Identity = tuple[int, int, int, int]
"""Of a file's content: device, inode, time of writing in nanoseconds, size."""


def write_atomically(path: Path, content: bytes, durable: bool = True) -> Identity:
    """Replaces the file at `path`: after a crash it holds either its old or its new content, whole.

    Args:
        path: of the file.
        content: its new content.
        durable: whether it is on the disk when this returns. If not, a power failure may take the file away: for copies
            that nothing depends on, since a disk takes milliseconds for it.

    Returns:
        The new content's identity, also if another process has replaced it since.

    Raises:
        StorageError: the folder or the disk does not take it. The old content is intact.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            written = _identity(os.fstat(file.fileno()))
        temporary.replace(path)
        if durable:
            _keep_names(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StorageError(f"{path} cannot be written: {error.strerror}; what was there before is intact") from error
    return written


def _keep_names(folder: Path) -> None:
    """Has the system write a folder's names to disk, where it can: else a power failure may undo a renaming."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def identity(path: Path) -> Identity | None:
    """What changes when the file's content does; None where there is no file."""
    try:
        return _identity(path.stat())
    except FileNotFoundError:
        return None


def _identity(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def keep_as(path: Path, other: Path) -> None:
    """Makes `other` hold what `path` holds, atomically; where the file system has hard links, nothing is written again.

    Raises:
        StorageError: the folder or the disk does not take it. The old content of `other` is intact.
    """
    temporary = _temporary(other)
    try:
        temporary.unlink(missing_ok=True)
        temporary.hardlink_to(path)
        temporary.replace(other)
    except OSError:
        write_atomically(other, path.read_bytes())
    finally:
        temporary.unlink(missing_ok=True)  # it stays where both names were one file already


def write_json(path: Path, values: Mapping[str, Any], durable: bool = True) -> None:
    """Writes nested plain values; see `write_atomically`."""
    write_atomically(path, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode(), durable)


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Raises:
        StorageError: the file is missing, unreadable or no JSON object.
    """
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise StorageError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise StorageError(f"{path} is damaged: it holds a {type(values).__name__}, not an object")
    return values


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any], durable: bool = True
) -> Identity:
    """Writes tensors and a record of plain values in one safetensors file, with a checksum over both.

    Args:
        path: of the file.
        tensors: name -> value, on the CPU.
        record: nested plain values.
        durable: see `write_atomically`.

    Returns:
        See `write_atomically`.
    """
    text = json.dumps(record)
    metadata = {_RECORD: text, _CHECKSUM: _checksum(text, tensors)}
    own, places = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():  # safetensors refuses two names of one memory
        place = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if place in places else tensor
        places.add(place)
    return write_atomically(path, save(own, metadata=metadata), durable)


def _checksum(record: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the record, and every tensor's name, dtype, shape and bytes."""
    found = hashlib.sha256(record.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_tensors` wrote.

    Returns:
        The tensors (on the CPU) and the record.

    Raises:
        StorageError: the file is missing, truncated, changed since it was written, or not one of ours, or a tensor
            is not float32.
    """

    def take(file: Any, metadata: Mapping[str, str]) -> dict[str, Tensor]:
        tensors = {name: _float32(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        if _checksum(metadata[_RECORD], tensors) != metadata[_CHECKSUM]:
            raise ValueError("its checksum is not that of its content")
        return tensors

    return _read(path, take)


def read_record(path: Path) -> dict[str, Any]:
    """The record alone of what `write_tensors` wrote; the checksum, which needs the tensors, is not looked at.

    Raises:
        StorageError: the file is missing, truncated or not one of ours.
    """
    return _read(path, lambda _, __: None)[1]


def _read(path: Path, take: Callable[[Any, Mapping[str, str]], T]) -> tuple[T, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            record = parse_json(metadata[_RECORD])
            if not isinstance(record, dict):
                raise ValueError(f"its record is {shown(record)}, not an object")
            return take(file, metadata), record
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist") from error
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StorageError(f"{path} is damaged, or was not written by this version of tap-flower: {error}") from error


def _float32(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        raise ValueError(f"tensor {name!r} is {tensor.dtype}, not torch.float32")
    return tensor


def default_state_dir() -> Path:
    """Where clients' states are unless a node's `state-dir` or `Client.state_dir` says otherwise: in Flower's home."""
    return Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr")) / "tap-flower"
