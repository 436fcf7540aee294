"""Shows the progress of a run in the terminal, from its events."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn

from tap_flower.plain import counted

_WATCH_SECONDS, _LINE_SECONDS = 1.0, 60.0
"""Seconds between two looks at the clients' steps, and between two lines about them where the output is no terminal."""
_CLIENTS = 4
"""Clients at work whose steps are shown; the others are counted."""


class RunProgress(AbstractContextManager["RunProgress"]):
    """Shows rounds, clients, their steps, losses, replacements, the time left and memory.

    Where the output is no terminal, it writes a line for each round, and one a minute within a round.

    Args:
        console: the terminal or file to write to.
        run: the run folder, in which the clients of a simulation say how far they are; None where they do not.
    """

    def __init__(self, console: Console, run: Path | None = None) -> None:
        self._console, self._run = console, run
        # A notebook asks for colours, and has no terminal in which a line could be written over.
        self._live = console.is_terminal and console.file.isatty()
        self._watched = self._told = time.monotonic()
        self._began, self._first = time.monotonic(), 0
        self._made: dict[str, int] = {}
        self._bars = Progress(
            TextColumn("{task.description:<13}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("[dim]{task.fields[note]}"),
            TextColumn("[dim]{task.fields[work]}"),
            console=console,
            disable=not self._live,
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
                clients, pairs_of = counted(len(event["clients"]), "client"), counted(pairs, "modality-task pair")
                self._line(f"{clients} with {pairs_of}, {counted(event['rounds'], 'round')}")
            case "round_start" if self._bar is not None:
                self._bars.update(self._bar, note=f"round {event['round']}: {', '.join(event['clients'])}")
                self._made = {}
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
                self._next_bar("personalising", len(event["clients"]))
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
        said = f"round {event['round']}: {', '.join(event['clients'])}; {replaced} replacements; loss {note}"
        self._line("; ".join([said, *filter(None, [self._left()]), memory_in_use()]))

    def watch(self) -> None:
        """Shows how far the clients are that are at work; called as often as one likes, it looks once a second."""
        from tap_flower.report.client_records import read_steps  # it brings torch, which no command needs for its help

        now = time.monotonic()
        if self._run is None or self._bar is None or now - self._watched < _WATCH_SECONDS:
            return
        self._watched, self._made = now, {**self._made, **read_steps(self._run)}
        steps = [f"{client} {count}" for client, count in sorted(self._made.items())]
        more = [f"{len(steps) - _CLIENTS} more"] if len(steps) > _CLIENTS else []
        work = [f"steps made: {', '.join([*steps[:_CLIENTS], *more])}"] if steps else []
        work.append(memory_in_use())
        self._bars.update(self._bar, left=self._left(), work="; ".join(work))
        if steps and now - self._told >= _LINE_SECONDS:
            self._told = now
            self._line("; ".join([f"so far, {work[0]}", *filter(None, [self._left()]), work[-1]]))

    @property
    def _task(self) -> Task:
        return next(task for task in self._bars.tasks if task.id == self._bar)

    def _left(self) -> str:
        """The time that is left for the bar's rounds or clients, at the pace so far; nothing before the first is done."""
        task = self._task
        done = task.completed - self._first
        if task.total is None or not done or task.finished:
            return ""
        seconds = (time.monotonic() - self._began) / done * (task.total - task.completed)
        return f"about {duration(seconds)} left for {task.description}"

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def _next_bar(self, name: str, total: int | None, done: int = 0) -> None:
        if self._bar is not None:
            self._bars.stop_task(self._bar)
            if name == "rounds":  # there is nothing to say of the start any more
                self._bars.remove_task(self._bar)
        self._bar = self._bars.add_task(name, total=total, completed=done, note="", left="", work="")
        self._began, self._first, self._made = time.monotonic(), done, {}
        if name not in ("starting", "rounds"):
            self._line(f"{name} {counted(total or 0, 'client')}")

    def _advance(self, note: str) -> None:
        if self._bar is not None:
            self._bars.update(self._bar, advance=1, note=note)
            self._bars.update(self._bar, left=self._left(), work="")

    def _line(self, text: str) -> None:
        if not self._live:
            self._console.print(text, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time to look forward to, such as `40 s`, `12 min` or `3 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def memory_in_use() -> str:
    """Memory of this machine that is in use, by whatever process."""
    memory = psutil.virtual_memory()
    return f"memory {(memory.total - memory.available) / 1e9:.1f} of {memory.total / 1e9:.1f} GB in use"


def _losses(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{task} {loss:.3f}" for task, loss in losses.items())
