"""The study of newcomers: clients held out of a federation, which get stage 2 alone from what it has learned."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tap_flower.config import load_config, plain
from tap_flower.core.seeds import named_seed
from tap_flower.errors import ConfigError
from tap_flower.files import write_atomically
from tap_flower.methods.registry import find_method
from tap_flower.study.comparison import ALONE
from tap_flower.study.plan import (
    OF_CLIENTS,
    OF_STUDIES,
    STEPS,
    PlannedRun,
    Sweep,
    check_distinct,
    check_undecided,
    steps_as_tap,
)


def newcomers_study(
    preset: str,
    config: str,
    settings: Sequence[str],
    seeds: Sequence[int],
    methods: Sequence[str],
    share: float,
    out: Path,
) -> tuple[list[PlannedRun], Sweep]:
    """Plans the study of what a finished federation is worth to clients that were not in it.

    For each seed some clients are held out at random, so many that each of their tasks still has a client. The others
    train. Then the newcomers run stage 2 alone: all their tensors have the last values of the server, and where it has none
    (heads that stay on the clients, say) the first values of the seed; a personal model starts as the same. `local` starts
    from the first values. All have TAP's optimiser steps in stage 2.

    Args:
        preset: name of a preset.
        config: path of a YAML file, or nothing.
        settings: `key=value` strings.
        seeds: seeds of the runs.
        methods: names of methods, beside `local`.
        share: of the clients that are held out, at most.
        out: folder of the study.

    Returns:
        The federations, to be run first, and the sweep over the newcomers, whose reference is `local`.

    Raises:
        ConfigError: a setting is wrong, or every client has a task that nobody else has.
    """
    check_distinct("--seed", seeds)
    check_distinct("--method", methods)
    check_undecided(settings, OF_STUDIES | OF_CLIENTS)
    tap = load_config(preset, config, (*settings, "method=tap"))
    clients = plain(tap)["clients"]
    steps = {
        method: steps_as_tap(load_config(preset, config, (*settings, f"method={method}")), tap)
        for method in (*methods, ALONE)
    }
    federations, runs = list[PlannedRun](), dict[tuple[str, int], PlannedRun]()
    for seed in seeds:
        held_out = _held_out(clients, share, seed)
        files = {}
        for group, inside in (("members", False), ("newcomers", True)):
            files[group] = out / "groups" / f"{group}-{seed}.yaml"
            chosen = [client for client in clients if (client["name"] in held_out) == inside]
            write_atomically(files[group], yaml.safe_dump({"clients": chosen}).encode())
        for method in dict.fromkeys((*methods, ALONE)):
            own, name = (*settings, f"method={method}", f"seed={seed}"), f"seed-{seed}"
            start = out / "federations" / method / name if method != ALONE else None
            if start is not None:
                label = f"{method}, federation"
                federations.append(PlannedRun(label, seed, preset, str(files["members"].resolve()), own, start))
            file, alone = str(files["newcomers"].resolve()), (*own, *steps[method])
            runs[method, seed] = PlannedRun(method, seed, preset, file, alone, out / method / name, start, rounds=0)
    result = {method: find_method(method).result for method in (*methods, ALONE)}
    return federations, Sweep({STEPS: runs}, result, ALONE)


def _held_out(clients: Sequence[Mapping[str, Any]], share: float, seed: int) -> set[str]:
    """Names of clients drawn at random, whose tasks others have, too."""
    left = Counter(task["name"] for client in clients for task in client["tasks"])
    order, found = list(clients), set[str]()
    random.Random(named_seed(seed, "newcomers")).shuffle(order)
    for client in order:
        tasks = {task["name"] for task in client["tasks"]}
        if len(found) < max(int(share * len(clients)), 1) and all(left[task] > 1 for task in tasks):
            found.add(client["name"])
            left.subtract(tasks)
    if not found:
        raise ConfigError("the study of newcomers needs a client whose tasks others have, too: each has one of its own")
    return found
