"""The study of heterogeneity: clients of a classification task with label distributions of their own."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import log10
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml

from tap_flower.config import Config, client_specs, load_config, plain
from tap_flower.core.seeds import named_seed
from tap_flower.core.tasks import TASK_KINDS
from tap_flower.data.images import with_absolute_paths
from tap_flower.data.sources import open_source, rows_of, values_of
from tap_flower.data.spec import SPLITS, Source, TaskSpec
from tap_flower.errors import ConfigError
from tap_flower.files import write_atomically
from tap_flower.methods.registry import find_method
from tap_flower.plain import as_text
from tap_flower.study.comparison import ALONE, OVERALL
from tap_flower.study.plan import OF_CLIENTS, OF_STUDIES, PlannedRun, check_distinct, check_undecided
from tap_flower.study.studies import Study, Tell, Values, results_of

KINDS = ("image_classification", "text_classification")
SHARE = 0.5
"""Share of the rows that are dealt: were it all of them, the last ones to draw would get what the others have left."""


def heterogeneity_study(
    preset: str,
    config: str,
    settings: Sequence[str],
    seeds: Sequence[int],
    methods: Sequence[str],
    alphas: Sequence[float],
    out: Path,
) -> Study:
    """Plans the study of what label skew does to methods.

    The clients of each classification task that several have share out its rows anew, split by split: a client gets half as
    many as it had, so that rows of each class are left, and draws them by a label distribution of its own, from a Dirichlet
    distribution with the concentration α (0.1: mostly one class; 10: nearly all alike), in all splits the same. No two
    clients have a row in common; where they had (a test split, say), each gets half of its part. What is dealt is written to
    OUT/data.

    Args:
        preset: name of a preset.
        config: path of a YAML file, or nothing.
        settings: `key=value` strings.
        seeds: seeds of the runs.
        methods: names of methods, beside `local`.
        alphas: concentrations.
        out: folder of the study.

    Raises:
        ConfigError: a setting is wrong, no classification task has several clients, or theirs are not rows of one data set.
    """
    for option, values in (("--seed", seeds), ("--method", methods), ("--alpha", alphas)):
        check_distinct(option, values)
    check_undecided(settings, OF_STUDIES | OF_CLIENTS)
    names = list(dict.fromkeys((*methods, ALONE)))
    base = load_config(preset, config, settings)
    judged_by = {
        task.name: TASK_KINDS[task.kind].judged_by
        for spec in client_specs(base)
        for task in spec.tasks
        if task.kind in KINDS
    }
    runs: dict[tuple[float, int], dict[str, PlannedRun]] = {}
    skewed: set[str] = set()
    for seed in seeds:
        for alpha in alphas:
            if not alpha > 0:
                raise ConfigError(f"alpha = {alpha:g}: the concentration of a Dirichlet distribution is above 0")
            name = f"alpha-{as_text(alpha)}"
            clients, skewed = _skewed(base, alpha, seed, out / "data" / name / f"seed-{seed}")
            file = out / "groups" / f"{name}-seed-{seed}.yaml"
            write_atomically(file, yaml.safe_dump({"clients": clients}).encode())
            runs[alpha, seed] = {
                method: PlannedRun(
                    f"{method}, {name}",
                    seed,
                    preset,
                    str(file.resolve()),
                    (*settings, f"method={method}", f"seed={seed}"),
                    out / name / method / f"seed-{seed}",
                )
                for method in names
            }

    def measure(tell: Tell) -> Iterator[tuple[float, Values]]:
        for (alpha, _), by_method in runs.items():
            found: dict[str, dict[str, Mapping[str, float]]] = {}
            for method, run in by_method.items():
                model = find_method(method).result
                of_tasks = results_of(run, sorted(skewed), [model], tell)
                found[method] = {task: by_model[model] for task, by_model in of_tasks.items() if model in by_model}
            overall = {
                method: fmean(judged_by[task].score(metrics) for task, metrics in of_tasks.items())
                for method, of_tasks in found.items()
                if len(of_tasks) == len(skewed)
            }
            yield log10(alpha), {(OVERALL.capitalize(), "score (higher is better)"): overall}
            for task in sorted(skewed):
                values = {method: of[task][judged_by[task].metric] for method, of in found.items() if task in of}
                yield log10(alpha), {(task, judged_by[task].in_words): values}

    return Study(
        "heterogeneity",
        "What does label skew do?",
        f"Preset {preset}; the clients of {', '.join(sorted(skewed))} have label distributions of their own, from a "
        f"Dirichlet distribution with concentration α, in training and test data alike; mean over clients and its 95 % "
        f"interval over seeds {', '.join(map(str, seeds))}.",
        "log₁₀ α (to the left: more skew)",
        tuple(run for by_method in runs.values() for run in by_method.values()),
        measure,
    )


def dealt(
    labels: Sequence[str], counts: Sequence[int], weights: Sequence[Mapping[str, float]], seed: int
) -> list[list[int]]:
    """Deals rows to clients by a label distribution of each; no row twice.

    The clients draw in turn, one row each, by their distribution over the classes that still have rows, so that what is
    left is nobody's more than another's.

    Args:
        labels: the label of each row.
        counts: how many rows each client gets, together at most as many as there are.
        weights: of each client, label -> its probability.
        seed: of the draws.

    Returns:
        For each client, the places of its rows in `labels`.
    """
    random = np.random.default_rng(seed)
    left: dict[str, list[int]] = {}
    for place in random.permutation(len(labels)).tolist():
        left.setdefault(labels[place], []).append(place)
    classes = sorted(left)
    found: list[list[int]] = [[] for _ in counts]
    for turn in range(max(counts, default=0)):
        for rows, count, of_client in zip(found, counts, weights, strict=True):
            if turn < count:
                chances = np.array([of_client[label] * bool(left[label]) for label in classes])
                if not chances.sum():  # nothing is left of its classes
                    chances = np.array([float(len(left[label])) for label in classes])
                rows.append(left[classes[random.choice(len(classes), p=chances / chances.sum())]].pop())
    return found


def _skewed(config: Config, alpha: float, seed: int, folder: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """The clients with dealt rows, and the tasks that were dealt."""
    specs, clients, root = client_specs(config), deepcopy(plain(config)["clients"]), config.data.root
    held: dict[str, dict[int, TaskSpec]] = {}
    for number, spec in enumerate(specs):
        for task in spec.tasks:
            if task.kind in KINDS:
                held.setdefault(task.name, {})[number] = task
    held = {name: tasks for name, tasks in held.items() if len(tasks) > 1}
    if not held:
        raise ConfigError(
            "the study of heterogeneity needs a classification task that several clients have: there is none"
        )
    for name, tasks in held.items():
        pools = {split: _Pool.of(name, split, tasks, root, seed) for split in SPLITS}
        classes = sorted({label for pool in pools.values() for label in pool.labels})
        weights = {
            number: dict(zip(classes, _drawn(alpha, len(classes), named_seed(seed, "skew", name, number)), strict=True))
            for number in tasks
        }
        for split, pool in pools.items():
            of_clients = [weights[number] for number in pool.counts]
            deal = dealt(pool.labels, list(pool.counts.values()), of_clients, named_seed(seed, "deal", name, split))
            for number, places in zip(pool.counts, deal, strict=True):
                source, rows = pool.sources[number], [pool.rows[at] for at in places]
                image = tasks[number].fields(source).get("image")
                columns = image.columns if image else ()
                place = _written(source, rows, root, folder / name, f"{specs[number].name}-{split}", columns)
                kept = {"domain": source.domain, "columns": source.columns, "templates": source.templates}
                (entry,) = (task for task in clients[number]["tasks"] if task["name"] == name)
                entry[split] = {"format": "disk", "path": str(place.resolve()), **{k: v for k, v in kept.items() if v}}
    return clients, set(held)


def _written(source: Source, rows: Sequence[int], root: str, folder: Path, name: str, images: Sequence[str]) -> Path:
    """The folder that holds these rows, which other rows of that name do not have; paths of `images` become absolute."""
    digest = hashlib.sha256(repr((source.place, rows, images)).encode()).hexdigest()[:12]
    place, part = folder / f"{name}-{digest}", folder / f"{name}.part"
    if not place.exists():
        shutil.rmtree(part, ignore_errors=True)  # of a study that was killed
        data = open_source(source, root).select(rows)
        for column in images:
            data = with_absolute_paths(data, column, source)
        data.save_to_disk(str(part))
        part.rename(place)
    return place


def _drawn(alpha: float, classes: int, seed: int) -> list[float]:
    found: list[float] = np.random.default_rng(seed).dirichlet([alpha] * classes).tolist()
    return found


@dataclass(frozen=True)
class _Pool:
    """The rows of a split that the clients of a task share out.

    Attributes:
        sources: client -> where its rows came from.
        rows: of the data set.
        labels: of the rows, as texts.
        counts: client -> how many it gets.
    """

    sources: Mapping[int, Source]
    rows: Sequence[int]
    labels: Sequence[str]
    counts: Mapping[int, int]

    @classmethod
    def of(cls, name: str, split: str, tasks: Mapping[int, TaskSpec], root: str, seed: int) -> _Pool:
        lists = {number: task.splits[split] for number, task in tasks.items() if task.splits[split]}
        if not lists:
            return cls({}, [], [], {})
        if len({s.place for each in lists.values() for s in each}) > 1 or any(len(each) > 1 for each in lists.values()):
            raise ConfigError(f"task {name!r}: its {split} rows are of several data sets; skew needs those of one")
        sources = {number: each[0] for number, each in lists.items()}
        own = {number: rows_of(source, root, seed) for number, source in sources.items()}
        rows = sorted({row for of_client in own.values() for row in of_client})
        first = next(iter(sources))
        column = {**tasks[first].columns, **sources[first].columns}["label"]
        read = values_of(open_source(sources[first], root), rows, [column])
        labels = [str(values[column]) for part in read for _, values in part]
        share = SHARE * min(len(rows) / sum(map(len, own.values())), 1.0)
        return cls(sources, rows, labels, {number: max(int(share * len(held)), 1) for number, held in own.items()})
