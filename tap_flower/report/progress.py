"""Shows the progress of a run in the terminal, from its events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        self._use: Mapping[str, Callable[[dict[str, Any]], None]] = {
            "start": self._start,
            "round_start": self._round_start,
            "round": self._round,
            "dropped": self._dropped,
            "clipped": self._clipped,
            "privacy": self._privacy,
            "end": self._end,
            "distill_start": lambda e: self._next_bar("distilling", len(e["clients"])),
            "distilled": lambda e: self._advance(f"{e['client']} {_losses(e['losses'])}"),
            "evaluate_start": lambda e: self._next_bar("evaluating", len(e["clients"])),
            "evaluated": lambda e: self._advance(str(e["client"])),
        }

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
        if event["event"] in self._use:
            self._use[event["event"]](event)

    def _start(self, event: dict[str, Any]) -> None:
        self._next_bar("rounds", event["rounds"], done=event["round"])
        pairs = sum(len(tasks) for tasks in event["clients"].values())
        self._line(f"{len(event['clients'])} clients with {pairs} modality-task pairs, {event['rounds']} rounds")

    def _round_start(self, event: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bars.update(self._bar, note=f"round {event['round']}: {', '.join(event['clients'])}")

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

    def _dropped(self, event: dict[str, Any]) -> None:
        self._console.print(f"[yellow]dropped the reply of {event['who']}: {escape(event['problem'])}", highlight=False)

    def _clipped(self, event: dict[str, Any]) -> None:
        note = f"scaled down the update of client {event['client']!r}: its norm {event['norm']:g} is above "
        self._console.print(f"[yellow]{note}{event['clip_norm']:g}", highlight=False)

    def _privacy(self, event: dict[str, Any]) -> None:
        plan = (
            f"private: ε {event['epsilon']:g} at δ {event['delta']:g}, noise multiplier {event['noise_multiplier']:.3g}"
        )
        self._console.print(f"{plan}; a component needs {event['holders_needed']} clients in a round", highlight=False)
        for count in sorted(set(event["never"].values())):
            names = ", ".join(component for component, holders in event["never"].items() if holders == count)
            self._console.print(f"[yellow]not averaged, having {count} clients: {names}", highlight=False)

    def _end(self, event: dict[str, Any]) -> None:
        if "privacy" in event:
            spent, parts = event["privacy"], event["privacy"]["components"].values()
            released = f"{sum(part['rounds'] > 0 for part in parts)} of {len(parts)} components were released"
            self._console.print(
                f"privacy: ε {spent['epsilon']:.3f} at δ {spent['delta']:g}; {released}", highlight=False
            )

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
