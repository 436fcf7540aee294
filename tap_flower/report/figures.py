"""The report's figures: what of a run goes into which chart, and the table behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tap_flower.report import charts
from tap_flower.report.charts import Point, Series
from tap_flower.report.client_records import DecisionRecord
from tap_flower.report.result_tables import Table
from tap_flower.report.results import headlines, models_in
from tap_flower.report.run_record import RunRecord
from tap_flower.report.svg import number

LOSS = {
    "image_classification": "cross-entropy, nats (lower is better)",
    "text_classification": "cross-entropy, nats (lower is better)",
    "text_generation": "cross-entropy of a token, nats (lower is better)",
    "image_generation": "squared error, normalised pixels (lower is better)",
}
"""Kind of task -> what its loss is, for an axis."""
_FEW = 60
"""Decisions up to which the compared losses have marks of their own."""
_MANY = 1500
"""Points of a chart up to which each has a mark; more of them would hide each other."""


@dataclass(frozen=True)
class Figure:
    """A chart with its title, its legend and its table.

    Attributes:
        title: stands above the chart.
        chart: the picture, as SVG, or a table with shaded cells.
        table: the numbers behind it, where the chart does not say them all.
        legend: names of the series, which can be switched off and on.
        names: a picture of the rows' names, beside a chart that scrolls.
    """

    title: str
    chart: Markup | Table
    table: Table | None
    legend: Sequence[str] = ()
    names: Markup | None = None


def loss_of(kind: str) -> str:
    """The name and unit of the loss of a kind of task, for an axis; of a user's own kind only that it is a loss."""
    return LOSS.get(kind, "loss (lower is better)")


def client_figures(run: RunRecord) -> Iterator[Figure]:
    """A figure for each task: every client's headline metric with every model."""
    results, judged_by = run.results, headlines(run.results)
    for task, by_model in results["tasks"].items():
        metric, in_words = judged_by[task].metric, judged_by[task].in_words
        models = [model for model in models_in({task: by_model}) if metric in by_model[model]]
        values = {
            model: {
                name: by_task[task][model][metric]
                for name, by_task in results["clients"].items()
                if metric in by_task.get(task, {}).get(model, {})
            }
            for model in models
        }
        means = {model: by_model[model][metric] for model in models}
        clients = sorted({name for of_model in values.values() for name in of_model})
        table = Table(
            f"{task}: {in_words}, each client",
            ["client", *models],
            [[name, *(number(values[model].get(name)) for model in models)] for name in clients],
        )
        label = f"{task}: {metric} of each client and the mean, by model"
        yield Figure(task, charts.dot_rows(values, means, in_words, label), table)


def loss_figures(run: RunRecord) -> Iterator[Figure]:
    """A figure for each task: the training loss of the server's copy on each client, by round."""
    kinds = run.results["kinds"]
    for task in sorted(kinds):
        losses: dict[str, dict[int, float]] = {}
        for event in run.rounds:
            for client, report in event["clients"].items():
                if task in report["losses"]:
                    losses.setdefault(client, {})[event["round"]] = report["losses"][task]
        if not losses:
            continue
        few = sum(map(len, losses.values())) <= _MANY
        series = [
            Series(client, [Point(r, v, f"{r}: {number(v)}") for r, v in by_round.items()], f"{client}, round ", few)
            for client, by_round in sorted(losses.items())
        ]
        names = [one.name for one in series]
        rounds = sorted({r for by_round in losses.values() for r in by_round})
        rows = [[str(r), *(number(losses[n][r]) if r in losses[n] else "" for n in names)] for r in rounds]
        table = Table(f"{task}: training loss, {loss_of(kinds[task])}", ["round", *names], rows)
        label = f"{task}: training loss of the server's copy by round, {len(series)} clients"
        yield Figure(
            task,
            charts.line_chart(series, charts.rounds_axis(run.results["rounds"]), loss_of(kinds[task]), label),
            table,
            names,
        )


def replacement_map(run: RunRecord) -> Figure | None:
    """A map of client and task × round: where a client took part, and where its components were replaced."""
    found: dict[tuple[str, str], dict[int, bool]] = {
        (client, task): {} for client, by_task in run.results["clients"].items() for task in by_task
    }
    for event in run.rounds:
        for client, report in event["clients"].items():
            for task, replaced in report["replacements"].items():
                found.setdefault((client, task), {})[event["round"]] = bool(replaced)
    if not any(found.values()):
        return None
    # client-10 stands behind client-9.
    ordered = sorted(found.items(), key=lambda item: (len(item[0][0]), item[0]))
    lanes = {f"{client} · {task}": by_round for (client, task), by_round in ordered}
    rows = [
        [name, str(len(by_round)), str(sum(by_round.values())), ", ".join(str(r) for r, was in by_round.items() if was)]
        for name, by_round in lanes.items()
    ]
    table = Table("Replacements", ["client · task", "rounds", "replaced", "in rounds"], rows)
    total = sum(sum(by_round.values()) for by_round in lanes.values())
    label = f"Replacements by client, task and round: {total} in all"
    names, chart = charts.round_map(lanes, run.results["rounds"], label)
    return Figure("Replacements", chart, table, names=names)


def decision_figures(run: RunRecord, client: str) -> Iterator[Figure]:
    """A figure for each of a client's tasks: the losses that were compared, by round, and what was decided."""
    by_task: dict[str, list[DecisionRecord]] = {}
    for decision in run.clients[client].decisions:
        by_task.setdefault(decision.task, []).append(decision)
    last = run.results["rounds"]
    stages = {last + 1: ", before stage 2", last + 2: ", after stage 2"}
    for task, decisions in by_task.items():
        teacher, personal, rows = [], [], []
        for d in decisions:
            done = "kept" if not d.replaced else "replaced" if d.share in (None, 1) else f"mixed, α = {d.share:g}"
            cells = (number(d.teacher_loss), number(d.personal_loss), f"{d.margin:g}")
            when = f"{d.round}{stages.get(d.round, '')}"
            tip = "{}: {} against {}, margin {}: {}".format(when, *cells, done)
            if d.teacher_loss is not None:
                teacher.append(Point(d.round, d.teacher_loss, tip, filled=d.replaced))
            if d.personal_loss is not None:
                personal.append(Point(d.round, d.personal_loss, tip, filled=False))
            rows.append([when, *cells, done])
        few = len(decisions) <= _FEW  # with more, the values are in the tips of the decisions alone
        series = [Series("server's copy", teacher, "round "), Series("personal model", personal, "round ", few)]
        unit = loss_of(run.results["kinds"].get(task, ""))
        table = Table(
            f"{task}: losses at each decision, {unit}",
            ["round", "server's copy", "personal", "margin", "decision"],
            rows,
        )
        label = f"{client}, {task}: losses at {len(decisions)} decisions, {sum(d.replaced for d in decisions)} replaced"
        axis = charts.rounds_axis(max(last, *(d.round for d in decisions)))
        chart = charts.line_chart(series, axis, unit, label)
        yield Figure(task, chart, table, [one.name for one in series])


def byte_figure(run: RunRecord) -> Figure | None:
    """MB of each component in the whole run, in both directions, the largest first."""
    of_components = run.results["bytes"].get("per_component", {})  # a kept run has none
    found = [(name, way["down"] / 1e6, way["up"] / 1e6) for name, way in of_components.items()]
    if not found:
        return None
    found.sort(key=lambda one: -(one[1] + one[2]))
    rows = [[name, number(down), number(up)] for name, down, up in found]
    most = max(max(down, up) for _, down, up in found) or 1.0
    shades = {(place, column): one[column] / most for place, one in enumerate(found) for column in (1, 2)}
    header = ["component", "to clients", "back"]
    return Figure("MB by component", Table("MB in the whole run (lower is better)", header, rows, shades=shades), None)


def gradient_figure(run: RunRecord, client: str) -> Figure | None:
    """Cosines between the gradients of a client's pairs on the components that they share; None where it has one pair."""
    pairs = run.clients[client].gradients
    if not pairs:
        return None
    names = sorted({pair[end] for pair in pairs for end in ("a", "b")})
    cosines = {frozenset((pair["a"], pair["b"])): pair["cosine"] for pair in pairs}
    matrix = [[1.0 if a == b else cosines.get(frozenset((a, b))) for b in names] for a in names]
    shades = {(i, j): cosine or 0.0 for i, row in enumerate(matrix) for j, cosine in enumerate(row, 1)}
    rows = [[name, *map(number, row)] for name, row in zip(names, matrix, strict=True)]
    components = [
        [f"{pair['a']} and {pair['b']}", component, number(cosine)]
        for pair in pairs
        for component, cosine in pair["components"].items()
    ]
    return Figure(
        client,
        Table("Cosine between gradients", ["task", *names], rows, shades=shades),
        Table("Cosine on each shared component", ["pair", "component", "cosine"], components),
    )
