"""What is shown of a run while it goes on."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from tap_flower.cli.progress import RunProgress, duration
from tap_flower.core.own_loop import recorded_steps
from tap_flower.report.client_records import STEPS, read_steps


def shown(*events: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    with RunProgress(console) as progress:
        for event in events:
            progress.show(event)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_without_a_terminal_give_lines() -> None:
    console = Console(force_terminal=True, color_system=None, file=io.StringIO())
    with RunProgress(console) as progress:
        progress.show({"event": "start", "round": 0, "rounds": 2, "clients": {"ann": ["read"]}})
    assert console.file.getvalue() == "1 client with 1 modality-task pair, 2 rounds\n"  # type: ignore[attr-defined]


class Clock:
    """A clock that stands still until it is put on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("tap_flower.cli.progress.time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.mark.parametrize("terminal", [True, False])
def test_steps_of_clients_time_left_and_memory_are_shown(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    console = Console(force_terminal=terminal, record=True, width=300, file=Terminal())
    reports = {"ann": {"losses": {"read": 1.0}, "replacements": {"read": 1}}}
    with RunProgress(console, tmp_path) as progress:
        progress.show({"event": "start", "round": 2, "rounds": 5, "clients": {"ann": ["read"]}})
        progress.show({"event": "round_start", "round": 3, "clients": ["ann"]})
        clock.now = 30.0
        progress.show({"event": "round", "round": 3, "clients": reports, "dropped": [], "seconds": 30.0})
        progress.show({"event": "round_start", "round": 4, "clients": ["ann"]})
        for name, steps in (("ann", "12"), ("bob", "7"), ("cleo", "")):  # one that is being written
            (tmp_path / "clients" / name).mkdir(parents=True)
            (tmp_path / "clients" / name / STEPS).write_text(steps)
        clock.now = 95.0
        progress.watch()
        progress.watch()
    text = console.export_text()
    assert "steps made: ann 12, bob 7" in text
    assert "cleo" not in text
    assert re.search(r"memory \d+\.\d of \d+\.\d GB in use", text)
    # A round of 30 s, then one of more than 65: two are left.
    assert "about 3 min left for rounds" in text
    if not terminal:
        lines = text.splitlines()
        first = "round 3: ann; 1 replacements; loss read 1.000; about 60 s left for rounds; memory "
        assert lines[1].startswith(first)
        assert lines[2].startswith("so far, steps made: ann 12, bob 7; about 3 min left for rounds; memory ")
        assert len(lines) == 3


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5300, "88 min"), (12000, "3 h 20 min")]
)
def test_a_duration_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_steps_are_kept_while_they_are_made(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    folder = tmp_path / "clients" / "ann"
    folder.mkdir(parents=True)
    (folder / STEPS).write_text("99")  # of a process that was killed
    with recorded_steps(folder / STEPS, every=0.0):
        assert read_steps(tmp_path) == {}
        for _ in range(3):
            parameter.grad = torch.ones(1)
            optimizer.step()
        assert read_steps(tmp_path) == {"ann": 3}
    assert list(folder.iterdir()) == []
    with recorded_steps(folder / STEPS, every=3600.0):
        optimizer.step()
        assert read_steps(tmp_path) == {}
    with recorded_steps(tmp_path / "nowhere" / STEPS, every=0.0):
        optimizer.step()
    with recorded_steps(None):
        optimizer.step()


def test_a_private_run_says_what_it_plans_leaves_out_and_has_spent() -> None:
    plan = {"event": "privacy", "epsilon": 8.0, "delta": 1e-5, "noise_multiplier": 1.2754, "holders_needed": 7}
    parts = {"x": {"rounds": 0}, "y": {"rounds": 4}}
    end = {"event": "end", "privacy": {"epsilon": 7.9999, "delta": 1e-5, "components": parts}}
    text = shown({**plan, "never": {"x": 2, "u": 1, "v": 2}}, end)
    assert "ε 8 at δ 1e-05, noise multiplier 1.28; a component needs 7 clients in a round" in text
    assert "not averaged, having 1 clients: u\nnot averaged, having 2 clients: x, v\n" in text
    assert "privacy: ε 8.000 at δ 1e-05; 1 of 2 components were released" in text


def test_a_clipped_update_is_told() -> None:
    text = shown({"event": "clipped", "client": "ann", "norm": 13.0, "clip_norm": 6.5})
    assert "scaled down the update of client 'ann': its norm 13 is above 6.5" in text


def test_a_run_without_privacy_says_nothing_of_it() -> None:
    assert "privacy" not in shown({"event": "end", "tasks": {}})


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_rounds_losses_and_replacements(terminal: bool) -> None:
    console = Console(force_terminal=terminal, record=True, width=200, file=Terminal())
    with RunProgress(console) as progress:
        progress.show({"event": "start", "round": 0, "rounds": 2, "clients": {"ann": ["read"], "bob": ["read"]}})
        progress.show({"event": "round_start", "round": 1, "clients": ["ann", "bob"]})
        reports = {
            "ann": {"losses": {"read": 1.0}, "replacements": {"read": 1}},
            "bob": {"losses": {"read": 2.0}, "replacements": {"read": 1}},
        }
        progress.show({"event": "round", "round": 1, "clients": reports, "dropped": [], "seconds": 1.0})
        progress.show({"event": "dropped", "round": 1, "who": "client 'bob'", "problem": "broken"})
        progress.show({"event": "unheard of"})
        progress.show({"event": "distill_start", "clients": ["ann"]})
        progress.show({"event": "distilled", "client": "ann", "losses": {"read": 0.5}})
        progress.show({"event": "evaluate_start", "clients": ["ann"]})
        progress.show({"event": "evaluated", "client": "ann"})
    shown = console.export_text()
    for text in (
        "2 replacements",
        "read 1.500",
        "dropped the reply of client 'bob': broken",
        "personalising",
        "evaluating",
    ):
        assert text in shown
