"""What a client returns beside tensors: its report on a participation, and the metrics of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from flwr.app import Array, RecordDict

from tap_flower.plain import shown
from tap_flower.wire.messages import (
    MessageError,
    check_number,
    check_values,
    decode,
    encode,
    refuse_tensors,
    whole,
)

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.-]{0,63}")
"""Names of models and metrics."""


@dataclass(frozen=True)
class Report:
    """What a client returns beside tensors.

    Attributes:
        server_round: of the instruction that it answers.
        examples: task name -> training examples.
        losses: task name -> mean training loss of the server's copy.
        steps: optimiser steps that the client made for it, of all models.
        replacements: task name -> 1 where the personal model's components were replaced, else 0.
        unchanged: components that training left as they were; their tensors are not in the message.
        validation: task name -> validation score of the client's own model, where the run may stop early; see `stopping`.
    """

    server_round: int
    examples: dict[str, int]
    losses: dict[str, float]
    steps: int
    replacements: dict[str, int]
    unchanged: tuple[str, ...] = ()
    validation: dict[str, float] = field(default_factory=dict)


Metrics = dict[str, dict[str, dict[str, float]]]
"""Task name -> model (`server`, `tap`, …) -> metric -> value."""


def encode_report(report: Report, arrays: Mapping[str, Array] | None = None) -> RecordDict:
    """What `decode_report` reads, with what the client returns of tensors."""
    return encode(asdict(report), arrays)


def decode_report(content: RecordDict, tasks: Iterable[str]) -> Report:
    """Reads and checks a client's report.

    Args:
        content: of the reply.
        tasks: the names that the client's manifest has.

    Raises:
        MessageError: a field is missing, is about another task, or is no number of the right kind.
    """
    values, names = decode(content), set(tasks)
    check_values(values, _REPORT, "the report")
    for key in ("examples", "losses", "replacements", "validation"):
        if not values[key].keys() <= names:
            raise MessageError(f"{key} is {shown(values[key])}, not an object about the tasks {sorted(names)}")
    for what, key in (("loss", "losses"), ("validation score", "validation")):
        for task, value in values[key].items():
            check_number(value, f"the {what} of task {task!r}")
    unchanged = values["unchanged"]
    return Report(
        server_round=whole(values, "server_round", 0),
        examples={task: whole(values["examples"], task, 1) for task in values["examples"]},
        losses=values["losses"],
        steps=whole(values, "steps", 0),
        replacements={task: whole(values["replacements"], task, 0) for task in values["replacements"]},
        unchanged=tuple(unchanged),
        validation=values["validation"],
    )


def decode_metrics(content: RecordDict, tasks: Iterable[str]) -> Metrics:
    """Reads and checks a client's evaluation: task -> model -> metric -> number.

    Raises:
        MessageError: it is anything else.
    """
    refuse_tensors(content)
    values, names = decode(content), set(tasks)
    check_values(values, {"metrics": dict[str, dict[str, dict[str, float]]]}, "the evaluation")
    metrics: Metrics = values["metrics"]
    if metrics.keys() != names:
        raise MessageError(f"the metrics are about {shown(sorted(metrics))}, not about the tasks {sorted(names)}")
    for task, by_model in metrics.items():
        for model, by_metric in by_model.items():
            for metric, value in by_metric.items():
                if not _WORD.fullmatch(model) or not _WORD.fullmatch(metric):
                    raise MessageError(f"{shown(model)}, {shown(metric)} are no names of a model and its metric")
                check_number(value, f"{metric} of task {task!r}, model {model!r},")
    return metrics


_REPORT = {
    "server_round": int,
    "examples": dict[str, Any],
    "losses": dict[str, float],
    "steps": int,
    "replacements": dict[str, Any],
    "unchanged": list[str],
    "validation": dict[str, float],
}
"""Field -> its type, of the plain values of a report."""
