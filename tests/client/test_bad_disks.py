"""Folders that cannot be written and disks that are full, for real: in a process that may not, or may not that much."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from tap_flower.client.state import ClientState, StateFolder
from tap_flower.errors import StorageError
from tap_flower.methods.method import Memory
from tap_flower.wire.messages import Epoch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and users as Linux has them")
resource = pytest.importorskip("resource", reason="limits and users as Linux has them")
FORK = multiprocessing.get_context("fork")
"""What a process gives up is gone for good; one that is forked need not import anything again."""


def save(folder: Path, limit: int, told: Connection) -> None:
    """Tells the error of writing a state where no file may be longer than `limit` bytes, or, if 0, by nobody."""
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    elif os.geteuid() == 0:
        os.setuid(65534)  # nobody; the superuser may write everywhere
    store = StateFolder(folder, "r1", [Epoch("h", 0)])
    try:
        with store.locked():
            store.save(ClientState(2, Memory({"personal": {"w": torch.full((5000,), 2.0)}}, {})))
    except StorageError as error:
        told.send(str(error))
    else:
        told.send("it was written")


@pytest.mark.parametrize(
    ("limit", "problem"),
    [
        (4096, "personal.safetensors cannot be written: File too large; what was there before is intact"),
        (0, "cannot be written: Permission denied; make it writable, or give another one"),
    ],
    ids=["a full disk", "a read-only folder"],
)
def test_what_cannot_be_written_is_said_and_the_state_before_is_intact(
    tmp_path: Path, limit: int, problem: str
) -> None:
    folder = tmp_path / "ann"
    store = StateFolder(folder, "r1", [Epoch("h", 0)])
    with store.locked():
        store.save(ClientState(1, Memory({"personal": {"w": torch.ones(3)}}, {})))
    for each in [folder, *folder.iterdir()]:
        each.chmod(0o555 if each == folder else 0o444)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_mode & 0o5 != 0o5 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o5)  # pytest's folders are the user's own
    heard, told = FORK.Pipe(duplex=False)
    process = FORK.Process(target=save, args=(folder, limit, told))
    process.start()
    told.close()
    said = heard.recv()
    process.join()
    folder.chmod(0o755)
    assert problem in said
    assert process.exitcode == 0
    found = store.load()
    assert found is not None
    assert found.round == 1
    assert found.memory.models["personal"]["w"].tolist() == [1.0, 1.0, 1.0]
    assert not list(folder.glob(".*.tmp"))
