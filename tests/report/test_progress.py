"""What is shown of a run while it goes on."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from tap_flower.report.progress import RunProgress


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
