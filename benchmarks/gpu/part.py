"""What a part of the check is, and how it is done in a process of its own."""

from __future__ import annotations

import faulthandler
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks import BEGAN, parity
from benchmarks.measure import Row, machine

EVENT = "\x1e"
"""Begins a line of a part's output that is JSON for the check's process, as in RFC 7464; every other line is for people."""


@dataclass(frozen=True)
class Asked:
    """What a part is to do.

    Attributes:
        device: that it is about.
        size: of the models, `base` or `tiny`.
        golden: folder of the golden cases.
    """

    device: torch.device
    size: str
    golden: Path


class SkippedError(Exception):
    """A part cannot run here, which is no fault; the message says why."""


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        seconds: its limit where ten minutes are shared among all parts.
        rows: what it does; a row of its results as soon as it has one.
    """

    seconds: float
    rows: Callable[[Asked], Iterator[Row]]


def absent(needed: Mapping[str, str]) -> list[str]:
    """The packages whose modules (module -> package) cannot be imported."""
    found = []
    for module, package in needed.items():
        try:
            importlib.import_module(module)
        except ImportError:
            found.append(package)
    return found


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


def work(part: Part, limit: float, asked: Asked) -> int:
    """Does a part, in a process of its own, and tells what it finds; returns the exit status."""

    def tell(**event: Any) -> None:
        say(f"{EVENT}{json.dumps(event)}")

    # Where it hangs is told just before it is killed.
    left = limit - (time.monotonic() - BEGAN)
    faulthandler.dump_traceback_later(max(left - 2, 0.9 * left, 0.1), file=sys.stdout)
    transformers_logging.disable_progress_bar()
    parity.exact_float32()
    try:
        tell(machine=machine())
        for row in part.rows(asked):
            tell(row=row)
    except SkippedError as error:
        tell(skipped=str(error))
    except Exception as error:
        traceback.print_exc()
        tell(failed=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return 1
    finally:
        faulthandler.cancel_dump_traceback_later()
    return 0
