"""Where the process of a client waits when a test tells it to, so that the test meets it there whatever the machine's speed.

A test and a client speak through empty or one-line files in one folder:

NAME.hold: the client waits before its first optimiser step, in every process that finds the file, as long as it is there.
NAME.held: written by the client: the process that waits.
NAME.passed: written by the test: the last process that need not wait any more. A process answers one message.
NAME.answered: written by the client: a line for each process that has answered a message and ended.
NAME.slow: the client's disk does not take a personal model as long as the file is there.
"""

from __future__ import annotations

import atexit
import os
import time
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_pre_hook

_LOOK = 0.1
"""Seconds between looks."""


def wait_where_told(folder: Path, name: str) -> None:
    """Has this process wait in training and in writing, when the files in the folder say so."""
    words = ("hold", "held", "passed", "answered", "slow")
    hold, held, passed, answered, slow = (folder / f"{name}.{word}" for word in words)
    me, write = str(os.getpid()), os.fsync

    def before_step(*_: object) -> None:
        while hold.exists() and not (passed.exists() and passed.read_text() == me):
            if not held.exists() or held.read_text() != me:
                held.write_text(me)
            time.sleep(_LOOK)

    def fsync(descriptor: int) -> None:
        file = Path(f"/proc/self/fd/{descriptor}").readlink().name
        while file.startswith(".personal.safetensors") and slow.exists():
            time.sleep(_LOOK)
        write(descriptor)

    def note() -> None:
        with answered.open("a") as file:
            file.write(f"{me}\n")

    atexit.register(note)
    register_optimizer_step_pre_hook(before_step)
    os.fsync = fsync
