"""`python -m benchmarks.evidence RUN...`: how far a decision on few held-out rows is to be trusted.

For every client and pair of finished simulations of `tap` it compares the server's model with the personal one after
stage 1, on the client's validation rows, as a replacement is decided, and on its test rows, which are more, and are used
here for this measurement alone. Given are, by kind of task and over all:

* `agree`: share of pairs for which both sets of rows prefer the same model;
* `sure`: share of pairs for which the difference on validation rows is more than one standard error from 0;
* `agree if sure`: `agree` among these;
* `lost`: mean loss on test rows of what validation rows prefer, less that of the better model;
* `halves`: how often two halves of the validation rows, by their places, prefer the same model.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from benchmarks.finished_run import clients, configuration
from benchmarks.measure import Row, show
from tap_flower.core.components import ComponentModel
from tap_flower.core.training import Batch
from tap_flower.methods.session import Session


def example_losses(session: Session, model: ComponentModel, split: str) -> dict[str, Tensor]:
    """Task name -> loss of each unit (an example, a token) of a split, float64 [units]."""
    found: dict[str, list[Tensor]] = defaultdict(list)

    def observe(batch: Batch, output: Tensor) -> None:
        found[batch.task].append(session.kinds[batch.task].losses(output, batch.target).double())

    session.evaluate(model, split, observe)
    return {task: torch.cat(losses) for task, losses in found.items()}


def compared(run: Path) -> list[dict[str, float | str]]:
    """One row for each client and pair of a run."""
    rows: list[dict[str, float | str]] = []
    for session, server, personal in clients(run, configuration(run)):
        losses = {
            (which, split): example_losses(session, session.model(state), split)
            for which, state in (("server", server), ("personal", personal))
            for split in ("validation", "test")
        }
        for task, kind in session.kinds.items():
            held_out, test = (
                losses["personal", split][task] - losses["server", split][task] for split in ("validation", "test")
            )
            halves = [float(held_out[first::2].mean()) for first in (0, 1)]
            error = float(held_out.std()) / sqrt(len(held_out))
            rows.append(
                {
                    "kind": kind.name,
                    "agree": float((held_out.mean() > 0) == (test.mean() > 0)),
                    "sure": float(abs(held_out.mean()) > error),
                    "lost": 0.0 if (held_out.mean() > 0) == (test.mean() > 0) else abs(float(test.mean())),
                    "halves": float((halves[0] > 0) == (halves[1] > 0)),
                }
            )
    return rows


def summary(kind: str, rows: Sequence[dict[str, float | str]]) -> Row:
    """Shares over pairs."""
    sure = [row for row in rows if row["sure"]]
    share = {key: fmean(float(row[key]) for row in rows) for key in ("agree", "sure", "lost", "halves")}
    return {
        "kind": kind,
        "pairs": len(rows),
        "agree": share["agree"],
        "sure": share["sure"],
        "agree if sure": fmean(float(row["agree"]) for row in sure) if sure else float("nan"),
        "lost": share["lost"],
        "halves": share["halves"],
    }


def main() -> None:
    """Prints a row for each kind of task, and one for all."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder with its clients' states")
    options.add_argument("--json", type=Path, help="write the rows to this file")
    given = options.parse_args()
    rows = [row for run in given.runs for row in compared(run)]
    kinds = sorted({str(row["kind"]) for row in rows})
    of_kinds = [(kind, [row for row in rows if row["kind"] == kind]) for kind in kinds]
    show([summary(kind, some) for kind, some in [*of_kinds, ("all", rows)]], given.json)


if __name__ == "__main__":
    main()
