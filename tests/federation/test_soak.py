"""A long run with many clients: the server's memory does not grow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from weakref import ReferenceType, ref

import pytest
from flwr.app import Array
from torch import Tensor

from tap_flower.config import Encoding
from tap_flower.wire import tensors as encodings

from .soak import SHAPES, soak

ROOT = Path(__file__).parents[2]


def test_the_server_keeps_no_update_of_a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[ReferenceType[Tensor]] = []

    from_array = encodings.from_array

    def watched(array: Array, encoding: Encoding) -> Tensor:
        tensor = from_array(array, encoding)
        received.append(ref(tensor))
        return tensor

    monkeypatch.setattr(encodings, "from_array", watched)
    dropped, alive = soak(tmp_path / "run", 5, 4, lambda: sum(tensor() is not None for tensor in received))
    assert dropped == 0
    assert len(received) == 4 * 5 * len(SHAPES)
    assert len(alive) == 5  # before the first round, and after each of four
    assert max(alive) <= len(SHAPES)  # the last reply at the most


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_servers_memory_does_not_grow_with_the_rounds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.federation.soak", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    dropped, early, late = map(int, done.stdout.split())
    assert dropped == 0
    assert abs(late - early) < 0.05 * early
