"""Processes are killed at random moments; a longer one by hand is in docs/deploy.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twenty_random_kills_lose_no_personal_model_and_no_result_is_wrong_without_a_mark(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos", str(tmp_path / "chaos"), "--kills", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["server"] + told["node"] == 20
    assert told["marked"] == 0
