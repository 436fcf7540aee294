"""What is shown of a run while it goes on."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from tap_flower.cli.progress import RunProgress


def shown(*events: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    with RunProgress(console) as progress:
        for event in events:
            progress.show(event)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


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
    console = Console(force_terminal=terminal, record=True, width=200, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
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
        "distilling",
        "evaluating",
    ):
        assert text in shown
