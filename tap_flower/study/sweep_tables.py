"""A comparison as tables of text, and these in Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

from tap_flower.plain import counted
from tap_flower.report.result_tables import Table
from tap_flower.study.comparison import NOT_WORSE, TITLES, Comparison
from tap_flower.study.statistics import ESTIMATE_COLUMNS, LEVEL, Estimate, csv_text

_NOT_WORSE = "Not worse: the interval over seeds of a client's mean score minus that of `local` is not wholly below 0."
_ESCAPES = str.maketrans(
    {
        "_": r"\_",
        "%": r"\%",
        "&": r"\&",
        "#": r"\#",
        "$": r"\$",
        "{": r"\{",
        "}": r"\}",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "\\": r"\textbackslash{}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "<": r"$<$",
        ">": r"$>$",
        "|": r"$|$",
        "±": r"$\pm$",
        "–": "--",
    }
)


def comparison_tables(found: Comparison) -> list[Table]:
    """The tables of a comparison: quality with mean ranks and costs below it, paired differences, the clients."""
    labels = list(found.labels)
    others = [label for label in labels if label != found.reference]
    seeds = f"{counted(len(found.seeds), 'seed')} ({', '.join(map(str, found.seeds))})"
    seeds = f"up to {seeds}" if found.unfinished else seeds
    quality = [[row.name, row.unit, *(_cell(row.values.get(label)) for label in labels)] for row in found.quality]
    strong = {(i, 2 + labels.index(label)) for i, row in enumerate(found.quality) for label in row.best}
    if found.ranks:
        lowest = min(found.ranks.values())
        strong |= {(len(quality), 2 + labels.index(label)) for label, rank in found.ranks.items() if rank == lowest}
        quality.append(["mean rank", "↓", *(f"{found.ranks[label]:.2f}" for label in labels)])
    differences = [
        [
            row.name,
            row.unit[:-2],
            *(_signed(row.differences.get(label), row.p_values.get(label)) for label in others),
        ]
        for row in found.quality
    ]
    clients = [[row.name, row.unit, *(_cell(row.values.get(label)) for label in labels)] for row in found.clients]
    quality += [[row.name, row.unit, *(_cell(row.values.get(label)) for label in labels)] for row in found.costs]
    worse = _NOT_WORSE if any(row.name == NOT_WORSE for row in found.clients) else ""
    title, star = (
        TITLES[found.budget],
        "positive is better, * where p < .05 after Holm's correction for a row's methods",
    )
    tables = [
        Table(
            f"{title}: test data, mean ± 95 % interval over {seeds}",
            ["task", "metric", *labels],
            quality,
            frozenset(strong),
            " ".join(filter(None, (found.unfinished, found.note))),
        ),
        Table(f"{title}: paired difference to {found.reference}, {star}", ["task", "metric", *others], differences),
        Table(
            f"{title}: over clients, mean ± 95 % interval over {seeds}",
            ["clients", "metric", *labels],
            clients,
            note=" ".join(filter(None, (found.unfinished, worse))),
        ),
    ]
    return [part for part in tables if part.rows and len(part.header) > 2]


def markdown(found: Sequence[Table]) -> str:
    """Tables in Markdown."""
    blocks = []
    for part in found:
        header = map(_cell_text, part.header)
        lines = [f"**{part.caption}**", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(part.header)]
        for i, row in enumerate(part.rows):
            cells = (f"**{cell}**" if (i, j) in part.best else cell for j, cell in enumerate(map(_cell_text, row)))
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", part.note] if part.note else []
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def latex(found: Sequence[Table]) -> str:
    """Tables in LaTeX, which need the package booktabs."""
    blocks = []
    for part in found:
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(part.caption)}}}"]
        lines += [rf"\begin{{tabular}}{{ll{'r' * (len(part.header) - 2)}}}", r"\toprule"]
        lines += [" & ".join(map(_latex, part.header)) + r" \\", r"\midrule"]
        for i, row in enumerate(part.rows):
            cells = (rf"\textbf{{{_latex(c)}}}" if (i, j) in part.best else _latex(c) for j, c in enumerate(row))
            lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", *([r"\\", _latex(part.note)] if part.note else []), r"\end{table}"]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def to_csv(comparisons: Sequence[Comparison]) -> str:
    """Comparisons as CSV: a line for each mean over seeds, with all its digits."""
    lines: list[Sequence[object]] = []
    for found in comparisons:
        parts = [("quality", row, row.values) for row in found.quality]
        parts += [("clients", row, row.values) for row in found.clients]
        parts += [("cost", row, row.values) for row in found.costs]
        lines += [
            (found.budget, what, row.name, row.unit, label, *astuple(one), None, None)
            for what, row, values in parts
            for label, one in values.items()
        ]
        to = f"difference to {found.reference}"
        lines += [
            (found.budget, to, row.name, row.unit, label, *astuple(one), one.p, row.p_values.get(label))
            for row in found.quality
            for label, one in row.differences.items()
        ]
        ranks = found.ranks.items()
        lines += [
            (found.budget, "mean rank", "", "", label, rank, None, len(found.ranked_seeds), None, None)
            for label, rank in ranks
        ]
    return csv_text(("budget", "what", "name", "unit", "method", *ESTIMATE_COLUMNS, "p", "p_holm"), lines)


def _cell_text(text: str) -> str:
    """The text of a cell in Markdown."""
    return text.replace("\\", r"\\").replace("|", r"\|")


def _cell(one: Estimate | None) -> str:
    if one is None:
        return "–"
    digits = 3 if abs(one.mean) < 10 else 1 if abs(one.mean) < 1000 else 0
    return f"{one.mean:.{digits}f}" + ("" if one.half is None else f" ± {one.half:.{digits}f}")


def _signed(one: Estimate | None, p: float | None) -> str:
    if one is None:
        return "–"
    spread = one.half is not None and one.half > 1e-9 * abs(one.mean)  # equal differences say nothing of their spread
    star = "*" if spread and p is not None and p < 1 - LEVEL else ""
    return f"{one.mean:+.3f}" + ("" if one.half is None else f" ± {one.half:.3f}") + star


def _latex(text: str) -> str:
    return text.translate(_ESCAPES)
