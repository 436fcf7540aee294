"""How a simulation is started; tests/test_end_to_end.py runs one."""

from __future__ import annotations

from pathlib import Path

from tap_flower.run.simulation import app_folder, cause


def test_the_flower_app_is_in_the_source_tree() -> None:
    assert app_folder() == Path(__file__).parent.parent.parent


def test_the_cause_of_a_failed_run_is_the_last_exception_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "flower.log"
    log.write_text(
        'Traceback (most recent call last):\n  File "a.py"\nValueError: first\n\x1b[91mERROR \x1b[0m: '
        "Traceback\ntap_flower.errors.ConfigError: rounds = 0 is out of bounds\nINFO: ended\n"
    )
    assert cause(log) == ": tap_flower.errors.ConfigError: rounds = 0 is out of bounds; the end of Flower's log:"
    log.write_text("INFO: ended\n")
    assert cause(log) == ":"
