"""How a simulation is started; tests/test_end_to_end.py runs one."""

from __future__ import annotations

from pathlib import Path

from tap_flower.run.simulation import app_folder


def test_the_flower_app_is_in_the_source_tree() -> None:
    assert app_folder() == Path(__file__).parent.parent.parent
