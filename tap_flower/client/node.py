"""What is set on a node, and never comes from the server: its client, its folders, its limits, metrics, a compiler."""

from __future__ import annotations

import faulthandler
import math
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType

from flwr.app import Context

from tap_flower.client.task import Client
from tap_flower.config import HyperParameters, Metrics, read_yaml, simulated_clients, simulated_run
from tap_flower.data.spec import ClientSpec, client_spec
from tap_flower.errors import ConfigError, MessageError, RunError, SpecError
from tap_flower.files import default_state_dir
from tap_flower.methods.registry import find_method

GRACE, LAST = 60.0, 60.0
"""GRACE: seconds of work after the server has stopped waiting. LAST: seconds until a process that ignores its deadline is
killed."""

GPU_WORKERS = 4
"""Threads that read ahead of training on a GPU, where nothing is said."""
_LONGEST = 1e9
"""Seconds that a clock of the system takes without overflow."""


@dataclass(frozen=True)
class Limits:
    """The most that a server may ask of a node; None leaves it at the bounds of the options.

    Attributes:
        steps: optimiser steps of each model in a round, and in stage 2; a method may train several models.
        batch_size: examples of an optimiser step.
        text_length: tokens of a text.
        rounds: number of the last round.
        seconds: time for one message.
    """

    steps: int | None = None
    batch_size: int | None = None
    text_length: int | None = None
    rounds: int | None = None
    seconds: int | None = None

    def check(self, limit: str, what: str, value: int) -> None:
        """Refuses what is above a limit.

        Raises:
            MessageError: with the value and the limit.
        """
        most: int | None = getattr(self, limit)
        if most is not None and value > most:
            raise MessageError(
                f"the server asks for {what} = {value}, and this node allows {most}: lower it in the run, or raise the "
                f"node's limit (`tap-flower node --limit {limit}={value}`, `max-{limit.replace('_', '-')}` in its "
                f"--node-config)"
            )

    def check_settings(self, settings: HyperParameters) -> None:
        """Refuses hyper-parameters that ask for too much.

        Raises:
            MessageError: with the value and the limit.
        """
        train = settings.train
        asked = ("train.steps", train.steps), ("distill.iterations", settings.distill.iterations)
        for (key, steps), times in zip(asked, find_method(settings.method).longest(settings), strict=True):
            self.check("steps", key if times == 1 else f"{times} · {key}", times * steps)
        self.check("batch_size", "train.batch_size · train.accumulation", train.batch_size * train.accumulation)
        self.check("text_length", "model.text_length", settings.model.text_length)

    @contextmanager
    def time(self, ttl: float) -> Iterator[None]:
        """Breaks off what takes longer than the server waits for it, or than this node allows.

        An exception in the main thread, where Flower runs an app, ends what runs Python. A process that does not come back
        to Python is ended with its traceback in the log: Flower starts a new one for the next message.

        Args:
            ttl: seconds that the server waits for the answer.

        Raises:
            RunError: the time is over.
        """
        seconds = min(ttl + GRACE, self.seconds or math.inf, _LONGEST)
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
            yield
            return

        def stop(_: int, __: FrameType | None) -> None:
            raise RunError(
                f"the work took longer than {seconds:g} s and was broken off: raise the run's round_timeout or the node's "
                f"max-seconds, or ask for less"
            )

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again each second, where somebody's `except` swallows it
        faulthandler.dump_traceback_later(seconds + LAST, exit=True, file=sys.__stderr__ or sys.stderr)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
            faulthandler.cancel_dump_traceback_later()


def limits_of(node: Mapping[str, object]) -> Limits:
    """The limits in a node's `--node-config`: `max-steps`, `max-batch-size`, `max-text-length`, `max-rounds`, `max-seconds`.

    Raises:
        SpecError: a limit is not a whole number from 1 on.
    """
    found: dict[str, int] = {}
    for field in fields(Limits):
        value = _count(node, f"max-{field.name.replace('_', '-')}", 1)
        if value is not None:
            found[field.name] = value
    return Limits(**found)


def _count(node: Mapping[str, object], key: str, least: int) -> int | None:
    """A whole number of a node's `--node-config`, None where it is not there."""
    value = node.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise SpecError(f"the node's {key} is {value!r}: write {key}=N with a whole number from {least} on")
    return value


@dataclass(frozen=True)
class Node:
    """A node's own settings.

    Attributes:
        spec: of its client.
        state_dir: folder for the states of the node's client, as STATE_DIR/CLIENT/RUN.
        folder: in a simulation, folder of the client's state, in place of STATE_DIR/CLIENT/RUN.
        data_root: folder with a mirror of the hub's data sets, or nothing.
        metrics: which further metrics it computes.
        compile: whether it runs its models through torch.compile.
        loader_workers: threads that read its client's data ahead of training; None is `GPU_WORKERS` with a GPU, else 0.
    """

    spec: ClientSpec
    state_dir: Path | None
    folder: Path | None
    data_root: str
    metrics: Metrics
    compile: bool = False
    loader_workers: int | None = None


def this_node(context: Context) -> Node:
    """The settings of the node that runs this: from its `--node-config`, or in a simulation from the run's configuration.

    Args:
        context: Flower's.

    Raises:
        ConfigError: a simulation has more nodes than clients.
        SpecError: the node lacks a setting, or one is wrong.
    """
    node = context.node_config
    if "client-spec" in node:
        if "state-dir" not in node:
            raise SpecError('the node has a client-spec but no state-dir: add state-dir="FOLDER" to its --node-config')
        spec = client_spec(read_yaml(Path(str(node["client-spec"])), "client spec"))
        metrics = Metrics(switch(node, "meteor"), str(node.get("bertscore-model", "")))
        data_root = str(node.get("data-root", ""))
        state_dir, workers = Path(str(node["state-dir"])), _count(node, "loader-workers", 0)
        return Node(spec, state_dir, None, data_root, metrics, switch(node, "compile"), workers)
    if "partition-id" not in node:
        raise SpecError(
            'the node has no client-spec: start it with --node-config \'client-spec="FILE" state-dir="FOLDER"\''
        )
    config, out = simulated_run(context.run_config, context.run_id)
    specs, partition = simulated_clients(context.run_config), int(node["partition-id"])
    if partition >= len(specs):
        raise ConfigError(
            f"there are more nodes than the {len(specs)} clients of preset {config.preset!r}: "
            f"use num-supernodes={len(specs)}"
        )
    spec, compute = specs[partition], config.compute
    folder = out / "clients" / spec.name
    return Node(spec, None, folder, config.data.root, config.metrics, compute.compile, compute.loader_workers)


def switch(node: Mapping[str, object], name: str) -> bool:
    """A setting of a node's `--node-config` that is true or false, or is not there.

    Raises:
        SpecError: it is something else.
    """
    value = node.get(name, False)
    if not isinstance(value, bool):
        raise SpecError(f"the node's {name} is {value!r}: write {name}=true or {name}=false in its --node-config")
    return value


def state_folder(client: Client, context: Context, run: str) -> Path:
    """`state-dir` of the node's configuration, the client's `state_dir`, or Flower's home; in it NAME/RUN."""
    if client.folder is not None:
        return client.folder
    state_dir = context.node_config.get("state-dir") or client.state_dir or default_state_dir()
    return Path(str(state_dir)) / client.name / run
