"""The one local training loop (teacher, personal model, stage 2 and every baseline use it), and evaluation."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tap_flower.core.task_checks import computing, metrics_of_kind
from tap_flower.core.tasks import Statistics, TaskKind, added
from tap_flower.errors import ClientError, DivergedError, users_line

CALL = "call"
"""Name of the only input where a loop of the project's own trains: (args, kwargs) of its call of the module."""


@dataclass(frozen=True)
class Batch:
    """Examples of one pair and one domain.

    Attributes:
        task: name of the task.
        inputs: what the model takes, by name.
        target: what the task's loss compares the output with.
    """

    task: str
    inputs: Mapping[str, Any]
    target: Tensor


def comparable(output: Any) -> Any:
    """What a kind of task compares of a module's output: its `logits`, as transformers name them, or the output itself."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    return getattr(output, "logits", output)


Objective = Callable[[Batch, Tensor], Tensor]
"""(batch, the model's output for it) -> a scalar that is added to the task's own loss, of distillation for example."""
Update = Callable[[int, torch.optim.Optimizer], None]
"""(number of the step, counted from 0, optimiser) changes the parameters in place of the optimiser's own step, after the
gradients have been computed and clipped."""


@dataclass(frozen=True)
class Optimisation:
    """How one participation trains (AdamW, fresh in each participation).

    Attributes:
        steps: optimiser steps.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        accumulation: batches per optimiser step; the step follows their mean loss.
        clip_norm: largest L2 norm of the gradient over all tensors.
        factors: tensor name -> factor on the learning rate; 1 where a name is missing.
    """

    steps: int
    learning_rate: float
    weight_decay: float = 0.01
    accumulation: int = 1
    clip_norm: float = 1.0
    factors: Mapping[str, float] = field(default_factory=dict)


def adamw(
    named: Iterable[tuple[str, torch.nn.Parameter]], optimisation: Optimisation
) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    """AdamW with a learning rate for each factor of `optimisation`.

    Args:
        named: names and parameters; those without `requires_grad` are left out.
        optimisation: learning rate, factors, weight decay.

    Returns:
        The optimiser, and the parameters that it changes.
    """
    groups: dict[float, list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        if parameter.requires_grad:
            groups[optimisation.factors.get(name, 1.0)].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": factor * optimisation.learning_rate} for factor, group in groups.items()],
        lr=optimisation.learning_rate,
        weight_decay=optimisation.weight_decay,
        fused=True,
    )
    return optimizer, [parameter for group in groups.values() for parameter in group]


def check_trainable(what: str, named: Iterable[tuple[str, torch.nn.Parameter]], trainable: Container[str]) -> None:
    """Refuses code that freezes parameters, or the other way round: all models of a client have one state.

    Args:
        what: the code, as an error names it.
        named: names and parameters after it; all get their `requires_grad` back.
        trainable: names of those that are to be trained.

    Raises:
        ClientError: it does; the message names a tensor.
    """
    if changed := [(name, p) for name, p in named if p.requires_grad is not (name in trainable)]:
        for name, parameter in changed:
            parameter.requires_grad_(name in trainable)
        raise ClientError(
            f"{what} {'freezes' if changed[0][0] in trainable else 'makes trainable'} {changed[0][0]!r}: `requires_grad` "
            f"must stay as `model` returns it, so set it there; after a call that changes it, such as peft's `set_adapter`, "
            f"set it back"
        )


@contextmanager
def torch_algorithms(deterministic: bool) -> Iterator[None]:
    """Chooses the algorithms that torch computes with inside the context, and names what they refuse.

    Args:
        deterministic: whether to call `torch.use_deterministic_algorithms(True)`, choose cuDNN's algorithms without trying
            them, and give cuBLAS the workspace that it needs for it, unless `CUBLAS_WORKSPACE_CONFIG` is set. All but that
            variable is put back afterwards. False leaves torch's settings as they are.

    Raises:
        ClientError: an operation has no deterministic implementation, or the backward pass goes through a recurrent layer
            in evaluation mode, which cuDNN has no kernel for.
    """
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        place = f" ({line})" if (line := users_line(error)) else ""
        if deterministic and (found := re.search(r"(\S+) does not have a deterministic implementation", str(error))):
            raise ClientError(
                f"compute.deterministic = true, and torch's {found[1]}{place} has no deterministic implementation on this "
                f"machine: use another operation, or set compute.deterministic=false"
            ) from error
        if "RNN backward can only be called in training mode" in str(error):
            raise ClientError(
                f"a recurrent layer of the model{place} is in evaluation mode while it, or what is below it, is trained, "
                f"and cuDNN has no backward pass for that: leave it in training mode with dropout=0, or call it inside "
                f"`torch.backends.cudnn.flags(enabled=False)`"
            ) from error
        raise
    finally:
        if deterministic:
            torch.use_deterministic_algorithms(enabled, warn_only=warns)
            torch.backends.cudnn.benchmark = benchmark


def train(
    model: nn.Module,
    kinds: Mapping[str, TaskKind],
    batches: Iterator[Batch],
    optimisation: Optimisation,
    objective: Objective | None = None,
    update: Update | None = None,
) -> dict[str, float]:
    """Trains `model` in place. Losses stay on its device until the last step: no step waits for a GPU to tell a number.

    Args:
        model: called with (task, inputs); its parameters with `requires_grad` are trained.
        kinds: task name -> kind.
        batches: an endless iterator; `steps · accumulation` batches are taken.
        optimisation: steps, learning rate and so on.
        objective: a further loss, added to the task's mean loss.
        update: what happens with the gradients of a step; without it, the optimiser's step.

    Returns:
        Task name -> mean training loss over all units seen (samples or tokens), without the further loss.

    Raises:
        ClientError: the model has changed which of its parameters are trained.
        DivergedError: a loss was NaN or infinite; the message names the task.
    """
    optimizer, parameters = adamw(model.named_parameters(), optimisation)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss_sum: dict[str, Tensor] = {}
    units: dict[str, int] = defaultdict(int)
    model.train()
    for number in range(optimisation.steps):
        optimizer.zero_grad(set_to_none=True)
        for _ in range(optimisation.accumulation):
            batch = next(batches)
            with computing(batch.task):
                output = model(batch.task, batch.inputs)
                losses = kinds[batch.task].losses(output, batch.target)
                loss = losses.mean()
                if objective is not None:
                    loss = loss + objective(batch, output)
                    model.train()  # again: its teacher, in evaluation mode, may share frozen modules with the model
                (loss / optimisation.accumulation).backward()  # type: ignore[no-untyped-call]
            total = losses.detach().double().sum()
            loss_sum[batch.task] = loss_sum[batch.task] + total if batch.task in loss_sum else total
            units[batch.task] += len(losses)
        # A parameter that no batch of this step reached has no gradient, and AdamW leaves it alone.
        torch.nn.utils.clip_grad_norm_(parameters, optimisation.clip_norm)
        if update is None:
            optimizer.step()
        else:
            update(number, optimizer)
    check_trainable("training", model.named_parameters(), trained)
    means = {task: float(loss_sum[task]) / units[task] for task in loss_sum}
    for task, mean in means.items():
        if not math.isfinite(mean):
            raise DivergedError(
                f"the training loss of task {task!r} is {mean} within {optimisation.steps} steps at learning rate "
                f"{optimisation.learning_rate:g}: lower the learning rate, or look for broken examples"
            )
    return means


Observer = Callable[[Batch, Tensor], None]
"""Is shown each batch of an evaluation, and the model's output for it."""


@torch.no_grad()
def evaluate(
    model: nn.Module, kinds: Mapping[str, TaskKind], batches: Iterable[Batch], observe: Observer | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of `model` over all of `batches`, each computed from sums over the whole data set.

    Args:
        model: called with (task, inputs), in evaluation mode and without gradients.
        kinds: task name -> kind.
        batches: a finite iterable over the data of one or more tasks.
        observe: gathers what metrics of other libraries need, the texts that were written for example.

    Returns:
        Task name -> metric name -> value; `loss` is among the metrics of every kind.
    """
    model.eval()
    sums: dict[str, Statistics] = {}
    for batch in batches:
        with computing(batch.task):
            output = model(batch.task, batch.inputs)
            if observe is not None:
                observe(batch, output)
            statistics = kinds[batch.task].statistics(output, batch.target)
        sums[batch.task] = added(sums.get(batch.task, {}), statistics)
    return {task: metrics_of_kind(kinds[task], task, statistics) for task, statistics in sums.items()}
