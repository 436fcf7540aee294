"""A long run with many clients: the server's memory does not grow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_servers_memory_does_not_grow_with_the_rounds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.federation.soak", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    dropped, early, late = map(int, done.stdout.split())
    assert dropped == 0
    assert abs(late - early) < 0.05 * early
