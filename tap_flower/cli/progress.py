"""Shows the progress of a run in the terminal, from its events."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from statistics import fmean
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class RunProgress(AbstractContextManager["RunProgress"]):
    """Shows rounds, clients, losses and replacements; one line a round where the output is no terminal.

    Args:
        console: the terminal or file to write to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description:<13}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar: TaskID | None = None
        self._replaced = 0

    def __enter__(self) -> RunProgress:
        self._bars.start()
        self._next_bar("starting", None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, event: dict[str, Any]) -> None:
        """Shows an event of `metrics.jsonl`."""
        match event["event"]:
            case "start":
                self._next_bar("rounds", event["rounds"], done=event["round"])
                pairs = sum(len(tasks) for tasks in event["clients"].values())
                clients = f"{len(event['clients'])} clients with {pairs} modality-task pairs"
                self._line(f"{clients}, {event['rounds']} rounds")
            case "round_start" if self._bar is not None:
                self._bars.update(self._bar, note=f"round {event['round']}: {', '.join(event['clients'])}")
            case "round":
                self._round(event)
            case "dropped":
                self._say(f"[yellow]dropped the reply of {event['who']}: {escape(event['problem'])}")
            case "joined":
                self._say(f"client {event['client']!r} has joined")
            case "clipped":
                norms = f"its norm {event['norm']:g} is above {event['clip_norm']:g}"
                self._say(f"[yellow]scaled down the update of client {event['client']!r}: {norms}")
            case "privacy":
                budget = f"ε {event['epsilon']:g} at δ {event['delta']:g}"
                needed = f"a component needs {event['holders_needed']} clients in a round"
                self._say(f"private: {budget}, noise multiplier {event['noise_multiplier']:.3g}; {needed}")
                for count in sorted(set(event["never"].values())):
                    names = ", ".join(component for component, holders in event["never"].items() if holders == count)
                    self._say(f"[yellow]not averaged, having {count} clients: {names}")
            case "distill_start":
                self._next_bar("distilling", len(event["clients"]))
            case "distilled":
                self._advance(f"{event['client']} {_losses(event['losses'])}")
            case "evaluate_start":
                self._next_bar("evaluating", len(event["clients"]))
            case "evaluated":
                self._advance(event["client"])
            case "end" if "privacy" in event:
                spent, parts = event["privacy"], event["privacy"]["components"].values()
                released = f"{sum(part['rounds'] > 0 for part in parts)} of {len(parts)} components were released"
                self._say(f"privacy: ε {spent['epsilon']:.3f} at δ {spent['delta']:g}; {released}")

    def _round(self, event: dict[str, Any]) -> None:
        replaced = sum(sum(c["replacements"].values()) for c in event["clients"].values())
        self._replaced += replaced
        losses: dict[str, list[float]] = {}
        for client in event["clients"].values():
            for task, loss in client["losses"].items():
                losses.setdefault(task, []).append(loss)
        note = _losses({task: fmean(values) for task, values in sorted(losses.items())})
        self._advance(f"{self._replaced} replacements; loss {note}")
        self._line(f"round {event['round']}: {', '.join(event['clients'])}; {replaced} replacements; loss {note}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def _next_bar(self, name: str, total: int | None, done: int = 0) -> None:
        if self._bar is not None:
            self._bars.stop_task(self._bar)
            if name == "rounds":  # there is nothing to say of the start any more
                self._bars.remove_task(self._bar)
        self._bar = self._bars.add_task(name, total=total, completed=done, note="")
        if name not in ("starting", "rounds"):
            self._line(f"{name} {total} clients")

    def _advance(self, note: str) -> None:
        if self._bar is not None:
            self._bars.update(self._bar, advance=1, note=note)

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text, highlight=False, soft_wrap=True)


def _losses(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{task} {loss:.3f}" for task, loss in losses.items())
