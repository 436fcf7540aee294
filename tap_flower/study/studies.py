"""Studies: sweeps over one quantity, each with a page of figures."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from tap_flower.config import load_config, plain
from tap_flower.core.seeds import named_seed
from tap_flower.core.tasks import TASK_KINDS
from tap_flower.errors import ConfigError
from tap_flower.files import write_atomically
from tap_flower.plain import as_text
from tap_flower.report.charts import Axis, Point, Series, line_chart
from tap_flower.report.figures import Figure
from tap_flower.report.html_report import write_study
from tap_flower.report.result_tables import Table
from tap_flower.report.results import headlines, read_results, scores, unmeasured
from tap_flower.report.svg import number
from tap_flower.study.comparison import OVERALL
from tap_flower.study.plan import OF_CLIENTS, OF_STUDIES, PlannedRun, check_distinct, check_undecided
from tap_flower.study.statistics import ESTIMATE_COLUMNS, Estimate, csv_text, estimate, slope_by_doubling

Values = Mapping[tuple[str, str], Mapping[str, float]]
"""(title, unit) of a figure -> name of a line -> value, with one seed."""
Curves = Mapping[str, Mapping[float, Estimate]]
"""Name of a line -> x -> mean and interval over seeds."""
Tell = Callable[[str], None]
COMPARED = ("server", "personal", "tap")
"""The models of the study of pairs."""


@dataclass(frozen=True)
class Study:
    """A study, ready to run.

    Attributes:
        name: name of its files.
        title: the question that it asks.
        lead: how it is measured.
        axis: name of the quantity that changes.
        runs: all its runs.
        measure: called after the runs, with what is called with a sentence for each value that is left out; gives
            (x, values) for every x and seed.
        by_doubling: whether the slope of each line over log₂ x is shown, with its interval over seeds.
    """

    name: str
    title: str
    lead: str
    axis: str
    runs: tuple[PlannedRun, ...]
    measure: Callable[[Tell], Iterable[tuple[float, Values]]]
    by_doubling: bool = False

    def write(self, out: Path) -> Path:
        """Writes the page, and the numbers as CSV, into a folder; returns the page's file."""
        left_out: list[str] = []
        collected = _collected(self.measure(left_out.append))
        found, slopes = _curves(collected), _slopes(collected) if self.by_doubling else {}
        lines: list[Sequence[object]] = [
            (title, line, x, *astuple(one))
            for (title, _), curves in found.items()
            for line, by_x in curves.items()
            for x, one in by_x.items()
        ]
        lines += [
            (title, line, "slope", *astuple(one)) for (title, _), each in slopes.items() for line, one in each.items()
        ]
        text = csv_text(("figure", "line", self.axis, *ESTIMATE_COLUMNS), lines)
        write_atomically(out / f"{self.name}.csv", text.encode())
        shown = [_slope_figure(slopes)] if slopes else []
        shown += [_figure(title, unit, self.axis, curves) for (title, unit), curves in found.items()]
        write_study(self.title, " ".join([self.lead, *left_out]), shown, out / f"{self.name}.html")
        return out / f"{self.name}.html"


def pairs_study(preset: str, config: str, settings: Sequence[str], seeds: Sequence[int], out: Path) -> Study:
    """Plans the study of how well one server model serves a pair as the number of pairs grows, at equal data and budget.

    Every client is split into clients of one pair. For each seed the pairs are put into an order of its own, and trained
    alone, all together, and in groups of each size that divides their number (one pair is left out where that gives more
    sizes: six of seven), each group a federation in which all clients take part in every round. A pair has the same clients,
    examples and optimiser steps in each; what differs is who else is averaged into the components that it shares.

    Args:
        preset: name of a preset.
        config: path of a YAML file, or nothing.
        settings: `key=value` strings.
        seeds: seeds of the runs.
        out: folder of the study.

    Raises:
        ConfigError: there are fewer than two tasks, or a setting is wrong.
    """
    check_distinct("--seed", seeds)
    every_round = {"clients_per_round": "all clients of a group take part in every round"}
    check_undecided(settings, OF_STUDIES | OF_CLIENTS | every_round)
    by_task: dict[str, list[dict[str, Any]]] = {}
    for client in plain(load_config(preset, config, settings))["clients"]:
        for task in client["tasks"]:
            one = {**client, "name": f"{client['name']}-{task['name']}", "tasks": [task]}
            by_task.setdefault(task["name"], []).append(one)
    if len(by_task) < 2:
        raise ConfigError(f"the study of pairs needs clients with two tasks at least; {preset!r} has {len(by_task)}")
    sizes = max((_divisors(count) for count in (len(by_task), len(by_task) - 1)), key=len)
    runs: dict[tuple[int, int], list[tuple[PlannedRun, list[str]]]] = {}
    for seed in seeds:
        order = sorted(by_task)
        random.Random(named_seed(seed, "pairs")).shuffle(order)
        for size in sizes:
            for first in range(0, sizes[-1], size):
                group = sorted(order[first : first + size])
                clients = [client for task in group for client in by_task[task]]
                file = out / "groups" / f"{'+'.join(group)}.yaml"
                write_atomically(file, yaml.safe_dump({"clients": clients, "clients_per_round": len(clients)}).encode())
                own = (*settings, "method=tap", f"seed={seed}")
                folder = out / "+".join(group) / f"seed-{seed}"
                run = PlannedRun(f"{size} pairs", seed, preset, str(file.resolve()), own, folder)
                runs.setdefault((seed, size), []).append((run, group))

    def measure(tell: Tell) -> Iterator[tuple[float, Values]]:
        for seed in seeds:
            found: dict[int, dict[str, Mapping[str, Mapping[str, float]]]] = {}
            for size in sizes:
                for run, group in runs[seed, size]:
                    found[size] = found.get(size, {}) | results_of(run, group, COMPARED, tell)
            alone = found[sizes[0]]
            whole = [task for task in sorted(alone) if all(of[task].keys() >= {*COMPARED} for of in found.values())]
            for size, by_task in found.items() if whole else ():
                relative = {
                    model: fmean(by_task[task][model]["loss"] / alone[task][model]["loss"] for task in whole)
                    for model in COMPARED
                }
                yield size, {("Test loss, relative to the pair alone", "loss / loss alone (lower is better)"): relative}
                for task in whole:
                    losses = {model: by_task[task][model]["loss"] for model in COMPARED}
                    yield size, {(task, "test loss (lower is better)"): losses}

    return Study(
        "pairs",
        "Does one model for all serve each pair worse as their number grows?",
        f"Preset {preset}; clients of one pair each, equal data and optimiser steps for a pair whatever their number; "
        f"groups of {', '.join(map(str, sizes))} of {sizes[-1]} pairs, drawn anew for each seed. A pair's test loss is "
        f"divided by its loss trained alone; mean over pairs, 95 % interval over seeds {', '.join(map(str, seeds))}. Below, "
        "each pair's test loss, over the seeds that drew it.",
        "pairs in the federation",
        tuple(run for of_size in runs.values() for run, _ in of_size),
        measure,
        by_doubling=True,
    )


def results_of(
    run: PlannedRun, tasks: Iterable[str], models: Iterable[str], tell: Tell
) -> dict[str, Mapping[str, Mapping[str, float]]]:
    """Task -> model -> metric -> value of a finished run, for some of its tasks.

    Args:
        run: the run.
        tasks: names of the tasks.
        models: names of the models that they should have results of.
        tell: called with a sentence for each task that has not.
    """
    of_run = read_results(run.folder)["tasks"]
    found = {task: of_run.get(task, {}) for task in tasks}
    for sentence in unmeasured(found, models):
        tell(f"{run.label}, seed {run.seed}: {sentence}.")
    return found


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def margin_study(
    preset: str, config: str, settings: Sequence[str], seeds: Sequence[int], margins: Sequence[float], out: Path
) -> Study:
    """Plans the study of what the margin of the replacement does to the result and to the number of replacements.

    Args:
        preset: name of a preset.
        config: path of a YAML file, or nothing.
        settings: `key=value` strings.
        seeds: seeds of the runs.
        margins: margins, each set for all kinds of task; a client's own margin goes before it.
        out: folder of the study.

    Raises:
        ConfigError: a seed or a margin is given twice, or a setting is one that the study decides.
    """
    check_distinct("--seed", seeds)
    check_distinct("--margin", margins)
    check_undecided(settings, OF_STUDIES | {"replacement.margin": "choose margins with --margin"})
    runs = {
        (margin, seed): PlannedRun(
            f"margin {as_text(margin)}",
            seed,
            preset,
            config,
            (*settings, "method=tap", *(f"replacement.margin.{kind}={margin}" for kind in TASK_KINDS), f"seed={seed}"),
            out / f"margin-{as_text(margin)}" / f"seed-{seed}",
        )
        for seed in seeds
        for margin in margins
    }

    def measure(tell: Tell) -> Iterator[tuple[float, Values]]:
        for (margin, _), run in runs.items():
            found, models = read_results(run.folder), ("personal", "tap")
            results_of(run, found["tasks"], models, tell)
            scored = {model: scores(found, model) for model in models}
            overall = {model: fmean(of.values()) for model, of in scored.items() if len(of) == len(found["tasks"])}
            yield margin, {(OVERALL.capitalize(), "score (higher is better)"): overall}
            for task, judged_by in headlines(found).items():
                by_model = found["tasks"].get(task, {})
                values = {model: by_model[model][judged_by.metric] for model in models if model in by_model}
                yield margin, {(task, judged_by.in_words): values}
            replaced = sum(sum(by_task.values()) for by_task in found["replacements"].values())
            yield margin, {("Replacements", "in a run, all clients and pairs"): {"replacements": replaced}}

    return Study(
        "margin",
        "How much does the margin of the replacement matter?",
        f"Preset {preset}, method tap; one margin for all kinds of task; test data, mean over clients and its 95 % interval "
        f"over seeds {', '.join(map(str, seeds))}.",
        "margin",
        tuple(runs.values()),
        measure,
    )


Collected = Mapping[tuple[str, str], Mapping[str, Mapping[float, Sequence[float]]]]
"""(title, unit) of a figure -> name of a line -> x -> its values, in the order of seeds."""


def _collected(measured: Iterable[tuple[float, Values]]) -> Collected:
    found: dict[tuple[str, str], dict[str, dict[float, list[float]]]] = {}
    for x, values in measured:
        for figure, by_line in values.items():
            for line, value in by_line.items():
                found.setdefault(figure, {}).setdefault(line, {}).setdefault(x, []).append(value)
    return found


def _curves(collected: Collected) -> dict[tuple[str, str], Curves]:
    """(title, unit) of each figure -> its curves."""
    return {
        figure: {line: {x: estimate(each) for x, each in by_x.items()} for line, by_x in by_line.items()}
        for figure, by_line in collected.items()
    }


def _slopes(collected: Collected) -> dict[tuple[str, str], dict[str, Estimate]]:
    """(title, unit) of each figure -> line -> its slope over log₂ x, of each seed by itself."""
    return {
        figure: {
            line: estimate(
                [slope_by_doubling(dict(zip(by_x, one, strict=True))) for one in zip(*by_x.values(), strict=True)]
            )
            for line, by_x in by_line.items()
        }
        for figure, by_line in collected.items()
    }


def _slope_figure(slopes: Mapping[tuple[str, str], Mapping[str, Estimate]]) -> Figure:
    lines = list(dict.fromkeys(line for each in slopes.values() for line in each))
    rows = [
        [title, *(_said(each[line]) if line in each else "" for line in lines)] for (title, _), each in slopes.items()
    ]
    table = Table("What each doubling adds: slope over log₂, 95 % interval over seeds", ["", *lines], rows)
    return Figure("Slopes", table, None)


def _figure(title: str, unit: str, axis: str, curves: Curves) -> Figure:
    marks = sorted({x for by_x in curves.values() for x in by_x})
    series = [
        Series(
            name, [Point(x, one.mean, f"{name}, {axis} {x:g}: {_said(one)}", half=one.half) for x, one in by_x.items()]
        )
        for name, by_x in curves.items()
    ]
    rows = [[f"{x:g}", *(_said(by_x[x]) if x in by_x else "–" for by_x in curves.values())] for x in marks]
    chart = line_chart(series, Axis(axis, marks), unit, f"{title}: {', '.join(curves)} by {axis}")
    return Figure(title, chart, Table(f"{title}: {unit}", [axis, *curves], rows), list(curves))


def _said(one: Estimate) -> str:
    return number(one.mean) + ("" if one.half is None else f" ± {number(one.half)}")
