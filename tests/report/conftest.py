"""A run folder made up of numbers: 30 clients, each with two tasks, all of them in each of 200 rounds."""

from __future__ import annotations

import json
import random
from base64 import b64encode
from pathlib import Path

import pytest

from tap_flower.core.components import Pair
from tap_flower.core.replacement import Decision
from tap_flower.core.tasks import TASK_KINDS
from tap_flower.report.client_records import record_evaluation
from tap_flower.report.events import EventLog
from tap_flower.report.results import results

HOSTILE = '"><script>alert(1)</script>&{{ 7 * 7 }}'
KINDS = {
    "digits": "image_classification",
    "answers": "text_generation",
    "pictures": "image_generation",
    HOSTILE: "text_classification",
}


def write_run(run: Path, clients: int, rounds: int) -> Path:
    """A run with clients of two tasks each, and hostile names in it."""
    chance, names = random.Random(1), [f"client-{n}" for n in range(clients)]
    tasks = {name: [list(KINDS)[n % 4], list(KINDS)[(n + 1) % 4]] for n, name in enumerate(names)}
    log = EventLog(run)
    decisions: dict[str, list[tuple[int, list[Decision]]]] = {name: [] for name in names}
    for server_round in range(1, rounds + 1):
        made = {}
        for name in names:
            found = []
            for task in tasks[name]:
                teacher, personal = chance.random(), chance.random() if server_round > 1 else float("inf")
                share = float(teacher + 0.01 < personal)
                found.append(Decision(Pair(task, ("text",)), teacher, personal, 0.01, share))
            decisions[name].append((server_round, found))
            made[name] = {
                "losses": {d.pair.task: d.teacher_loss for d in found},
                "replacements": {d.pair.task: int(d.replaced) for d in found},
            }
        log.write("round", round=server_round, clients=made, dropped=[], seconds=1.0)
    metrics = {"loss": 1.0, "accuracy": 0.5, "exact_match": 0.25, "mse": 0.5}
    models = ("server", "server+finetune", "personal", "tap")
    models_of = {
        n: {t: {m: {k: v * chance.random() for k, v in metrics.items()} for m in models} for t in tasks[n]}
        for n in names
    }
    found = results(
        preset="demo", method="tap", seed=41, rounds=rounds, kinds=KINDS,
        headlines={task: TASK_KINDS[kind].judged_by for task, kind in KINDS.items()},
        clients=models_of,
        replacements={}, steps={}, missing={}, marks={}, dropped={}, seconds={"total": 1.0},
        bytes_={"down": 2_000_000, "up": 10, "per_component": {f"c/{n}": {"down": n * 10_000, "up": n} for n in range(160)}},
    )  # fmt: skip
    (run / "results.json").write_text(json.dumps(found))
    (run / "config.yaml").write_text(f"seed: 41\nname: {json.dumps(HOSTILE)}\n")
    picture = b64encode(chance.randbytes(1800)).decode()
    for name in names:
        folder = run / "clients" / name
        folder.mkdir(parents=True)
        lines = [
            {"run": "run", "round": r, "task": d.pair.task, "teacher_loss": d.teacher_loss, "margin": d.margin,
             "personal_loss": d.personal_loss if r > 1 else None, "replaced": d.replaced}
            for r, of_round in decisions[name] for d in of_round
        ]  # fmt: skip
        (folder / "decisions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        answers = {
            "server": {"image": picture, "mse": 0.5},
            "personal": {"text": HOSTILE},
            "tap": {"label": "7", "probability": 0.5},
        }
        item = {"image": picture, "text": HOSTILE, "target": {"label": "7"}, "answers": answers}
        record_evaluation(
            folder,
            "run",
            {task: {"kind": KINDS[task], "items": [item] * 4} for task in tasks[name]},
            [
                {
                    "a": tasks[name][0],
                    "b": tasks[name][1],
                    "cosine": -0.5,
                    "components": {"fusion/shared_proj": -0.5, HOSTILE: None},
                }
            ],
        )
    return run


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("small") / "run", clients=4, rounds=6)


@pytest.fixture(scope="session")
def large_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("large") / "run", clients=30, rounds=200)
