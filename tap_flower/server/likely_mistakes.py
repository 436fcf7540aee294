"""Settings that are allowed but probably a mistake, told as a run begins: a misspelt task, too many clients a round."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from difflib import SequenceMatcher
from itertools import pairwise

from tap_flower.config import Config, plain
from tap_flower.data.spec import ClientSpec
from tap_flower.plain import leaves

_ALIKE = 0.8
"""Share of letters, after difflib's `ratio`, from which on two names are alike."""
_OF_SPECS = (
    "model.", "metrics.", "compute.precision", "compute.recompute", "compute.compile", "compute.loader_workers",
    "train.group_by_length",
)  # fmt: skip
"""Options of clients that a client spec describes."""
Held = tuple[str, str, str]
"""(client, task, kind of task)."""


def likely_mistakes(clients_per_round: int, fraction_train: float | None, held: Iterable[Held]) -> list[str]:
    """Sentences about settings that are allowed but probably a mistake.

    Args:
        clients_per_round: of the configuration.
        fraction_train: what takes its place in a strategy, if anything.
        held: which client has which task.
    """
    holders: dict[tuple[str, str], set[str]] = defaultdict(set)
    for client, task, kind in held:
        holders[task, kind].add(client)
    clients = set().union(*holders.values()) if holders else set()
    said = []
    if fraction_train is None and 0 < len(clients) < clients_per_round:
        said.append(
            f"clients_per_round = {clients_per_round}, and there are {len(clients)} clients: all of them train in "
            f"every round"
        )
    told = set[str]()
    for (task, kind), alone in holders.items():
        others = [name for (name, other), some in holders.items() if other == kind and not some & alone]
        near = next((name for name in others if _alike(task, name)), None)
        if len(alone) == 1 and near is not None and near not in told:
            theirs = holders[near, kind]
            have = f"client {min(theirs)!r} has" if len(theirs) == 1 else f"{len(theirs)} clients have"
            told.add(task)
            said.append(
                f"task {task!r} is client {min(alone)!r}'s alone, and {have} {near!r}: if both are one task, give it one "
                f"name, or nothing of its head is shared"
            )
    return said


def fewer_batches_than_tasks(config: Config, held: Iterable[Held]) -> list[str]:
    """A sentence where tasks cannot all have their turn in a participation, or in stage 2.

    Args:
        config: of the run.
        held: which client has which task.
    """
    counts = Counter(client for client, *_ in held)
    client, tasks = counts.most_common(1)[0] if counts else ("", 0)
    parts = [
        ("a participation", "train.steps", config.train.steps),
        ("stage 2", "distill.iterations", config.distill.iterations),
    ]
    return [
        f"client {client!r} has {tasks} tasks, and {what} has {key} · train.accumulation = "
        f"{steps * config.train.accumulation} batches of one task each: it leaves tasks out, drawn anew each time; raise "
        f"{key}"
        for what, key, steps in parts
        if 0 < steps * config.train.accumulation < tasks
    ]


def one_list_of_classes(specs: Iterable[ClientSpec]) -> list[str]:
    """A sentence for each two tasks of different clients that have other names and one list of classes.

    Args:
        specs: of all clients; classes that are only counted are none of a task's own.
    """
    names: dict[tuple[str, tuple[str, ...]], dict[str, str]] = defaultdict(dict)
    for spec in specs:
        for task in spec.tasks:
            if task.classes and not all(name.isdecimal() for name in task.classes):
                names[task.kind, task.classes].setdefault(task.name, spec.name)
    return [
        f"tasks {first!r} (client {by_name[first]!r}) and {other!r} (client {by_name[other]!r}) have one list of classes: "
        f"if both are one task, give it one name, or nothing of its head is shared"
        for by_name in names.values()
        for first, other in pairwise(by_name)
        if by_name[first] != by_name[other]
    ]


def without_effect(config: Config, own_modules: bool = False) -> list[str]:
    """Sentences about options that change nothing in this run, or not what one may expect.

    Args:
        config: of the run.
        own_modules: whether all clients have modules of their own, which no option builds.
    """
    said, train = [], config.train
    first, rounds = train.personal_from, config.rounds
    if own_modules:
        usual, chosen = (dict(leaves(plain(one))) for one in (Config(), config))
        idle = [f"{key} = {chosen[key]}" for key in chosen if key.startswith(_OF_SPECS) and chosen[key] != usual[key]]
        if idle:
            said.append(f"{', '.join(idle)}: without effect on clients with modules of their own")
    if train.start_learning_rate not in (None, train.learning_rate) and 0 < rounds <= train.warmup_rounds:
        said.append(
            f"train.warmup_rounds = {train.warmup_rounds} and rounds = {rounds}: the learning rate does not reach "
            f"train.learning_rate = {train.learning_rate:g}, and ends at {train.optimisation(rounds).learning_rate:.3g}"
        )
    if config.method == "tap" and config.replacement.enabled and first > rounds:
        said.append(
            f"train.personal_from = {first} and rounds = {rounds}: stage 1 trains no personal model, which changes by "
            f"replacement alone, and stage 2 trains it"
        )
    own = {client.get("backbone") for client in config.clients if isinstance(client, Mapping)}
    if own and None not in own and config.backbone not in own:
        names = ", ".join(sorted(map(str, own)))
        said.append(f"backbone = {config.backbone} is used by no client: each names its own, {names}")
    return said


def frozen_and_trained(trained: Mapping[str, Collection[str]], built: Mapping[str, Collection[str]]) -> list[str]:
    """A sentence for each client that does not train what others do under the name.

    Args:
        trained: client -> names of the tensors that it exchanges.
        built: client -> names of all tensors that its module was built with.
    """
    said, trainer = [], dict[str, str]()
    for client, names in trained.items():
        for name in names:
            trainer.setdefault(name, client)
    for client, names in built.items():
        if frozen := sorted((set(names) - set(trained[client])) & trainer.keys()):
            other = trainer[frozen[0]]
            count = sum(name in trained[other] for name in frozen)
            more = f" and {count - 1} more" if count > 1 else ""
            said.append(
                f"client {other!r} trains {frozen[0]!r}{more}, and client {client!r} does not, which keeps the run's first "
                f"values there: set `requires_grad` on both, or on neither"
            )
    return said


def _alike(one: str, other: str) -> bool:
    """Whether two names are alike, and differ in more than a number."""
    first, second = (re.sub(r"[-_]", "", name.lower()) for name in (one, other))
    if re.sub(r"\d+", "", first) == re.sub(r"\d+", "", second):
        return first == second
    return SequenceMatcher(None, first, second).ratio() >= _ALIKE
