"""`python -m benchmarks.stage_two RUN...`: many ways of stage 2 from one stage 1, compared without training it again.

The runs are finished simulations of `tap` whose folders still have their clients' states; those of one configuration and of
different seeds are compared with each other. From every client's personal model and its server copy after the last round,
each way runs stage 2 anew; its score is that of the sweeps, on test rows: choose with a configuration whose test rows are
no result's (`python -m benchmarks.tuning_clients`). `mixed` stands for what `replacement.after_stage_two` with
`replacement.mode=mix` does. Given are the mean over seeds, and the paired difference to the first way (95 % interval).
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.finished_run import clients, configuration
from benchmarks.measure import Row, show
from tap_flower.config import HyperParameters, ReplacementMode, StageTwo
from tap_flower.core.components import State
from tap_flower.methods import tap
from tap_flower.methods.method import Memory
from tap_flower.methods.session import Session
from tap_flower.study.statistics import Estimate, estimate, paired

TWICE, ONCE, DISTILLATION = StageTwo.finetuning_twice, StageTwo.finetuning, StageTwo.distillation
WAYS: dict[str, tuple[StageTwo, bool, bool, bool]] = {
    # way of stage 2, decided before it, decided after it, distillation only where the teacher is better
    "finetuning twice, before and after": (TWICE, True, True, False),
    "finetuning twice, before": (TWICE, True, False, False),
    "distillation where better, before and after": (DISTILLATION, True, True, True),
    "distillation, after": (DISTILLATION, False, True, False),
    "distillation": (DISTILLATION, False, False, False),
}


def main() -> None:
    """Prints a row for each way."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder with its clients' states")
    options.add_argument("--rate", type=float, help="learning rate of stage 2, in place of the run's")
    options.add_argument("--steps", type=int, help="optimiser steps K of stage 2, in place of the run's")
    options.add_argument("--threads", type=int, default=1, help="of PyTorch")
    options.add_argument("--json", type=Path, help="write the rows to this file")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    for run in given.runs:
        seed, found = measured(run, given.rate, given.steps)
        for way, score in found.items():
            scores[way][seed] = score
        print(f"{run}: done", flush=True)
    first = next(iter(scores.values()))
    rows: list[Row] = [
        {"way": way, "score": _said(estimate(list(by_seed.values()))), "difference": _said(paired(by_seed, first))}
        for way, by_seed in scores.items()
    ]
    show(rows, given.json)


def measured(run: Path, rate: float | None, steps: int | None) -> tuple[int, dict[str, float]]:
    """The seed of a run, and way -> mean over tasks of the mean score over clients."""
    config = configuration(run)
    if rate is not None:
        config.distill.learning_rate = rate
    if steps is not None:
        config.distill.iterations = steps
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for session, server, personal in clients(run, config):
        for way, state in results(session, server, personal).items():
            for task, score in session.scores(session.model(state), "test").items():
                found[way][task].append(score)
    return config.seed, {way: fmean(map(fmean, by_task.values())) for way, by_task in found.items()}


def results(session: Session, server: State, personal: State) -> Mapping[str, State]:
    """Way -> the model that a client has in the end."""
    made, settings = dict[str, State](), session.settings
    memory = Memory({tap.PERSONAL: personal} if personal else {})
    for name, (stage, before, after, only_better) in WAYS.items():
        session.settings = _with(settings, stage, before, after, only_better)
        made[name] = tap.second_stage(session, server, memory).models["tap"]
    held_out = session.losses(session.model(server), "validation")
    session.settings = _with(settings, ONCE, False, False, False)
    made["the server's model"], made["the personal model"] = server, personal or server
    for times, name in ((1, "FedAvg + fine-tuning"), (2, "FedAvg + fine-tuning twice")):
        made[name], _ = session.finetune(server, "server", times=times)
        made[f"{name}, mixed"], _ = tap.decided(session, made[name], server, held_out)
    session.settings = settings
    return made


def _with(settings: HyperParameters, stage: StageTwo, before: bool, after: bool, only_better: bool) -> HyperParameters:
    return replace(
        settings,
        distill=replace(settings.distill, stage=stage, only_better=only_better),
        replacement=replace(
            settings.replacement, mode=ReplacementMode.mix, before_stage_two=before, after_stage_two=after
        ),
    )


def _said(one: Estimate | None) -> str:
    if one is None:
        return "-"
    return f"{one.mean:.4f}" if one.half is None else f"{one.mean:.4f} ± {one.half:.4f}"


if __name__ == "__main__":
    main()
