"""Parity, and the training step: launched as always, compiled, and replayed as a CUDA graph."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import parity
from benchmarks.gpu.part import Asked
from benchmarks.measure import Row, count_flop, once, peak_bytes, reset_peak
from benchmarks.step import batches_of, measured, steps
from benchmarks.workload import backbone_of, client
from tap_flower.core.components import ComponentModel
from tap_flower.core.training import Batch, Optimisation, adamw
from tap_flower.methods.session import Session
from tap_flower.models.load import bfloat16_products

PATTERN = 7
BATCHES = {"base": (8, 32, 64), "tiny": (2, 4)}
"""Examples in a batch."""
GRAPH_BATCH = {"base": 32, "tiny": 2}
LENGTH = {"base": 64, "tiny": 8}
"""Tokens of a text."""
REPEATS = {"base": 3, "tiny": 1}
"""Measurements of a step."""
WARM_UP = 3
"""Steps before a CUDA graph is captured: what is chosen and allocated once must not be in it."""


def parity_rows(asked: Asked) -> Iterator[Row]:
    """The deviations of the device's numbers from golden ones and from the CPU's, see `benchmarks.parity`.

    Raises:
        ArithmeticError: float32 deviates; the message says where, and by how much.
    """
    rows = []
    for row in parity.compare_all(asked.golden, asked.device):
        rows.append(row)
        yield row
    if found := parity.problems(rows):
        raise ArithmeticError(f"{len(found)} deviations: {found[0]}")


def step_rows(model: str, compiled: bool, asked: Asked) -> Iterator[Row]:
    """A row for each dtype and batch size, of the dtypes that have products; what a GPU is used for comes first."""
    for dtype in (torch.bfloat16, torch.float32) if bfloat16_products() else (torch.float32,):
        yield from _steps_of_dtype(model, compiled, asked, dtype)


def _steps_of_dtype(model: str, compiled: bool, asked: Asked, dtype: torch.dtype) -> Iterator[Row]:
    sizes, device = BATCHES[asked.size], asked.device
    local = client(model, asked.size, PATTERN, sizes[-1], LENGTH[asked.size], dtype, device=device)
    net, backbone = local.model(), backbone_of(local)
    for size in sizes:
        row: dict[str, Any] = {"model": model, "dtype": str(dtype).removeprefix("torch."), "batch": size}
        row["mode"] = "compiled" if compiled else "eager"
        try:
            step = partial(steps, local, net, batches_of(local, size))
            backbone.compiled = False
            flop = count_flop(step)  # the compiled kernels would hide some
            backbone.compiled = compiled
            row["first s"] = once(step, device)
            row |= measured(step, dtype, device, REPEATS[asked.size], flop)
        except torch.cuda.OutOfMemoryError:
            row["note"] = "out of memory"
        yield row
        if "note" in row:  # by now the error has let go of its tensors
            _free(net)


def _free(net: torch.nn.Module) -> None:
    net.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()


class StaticStep:
    """An optimiser step with each of some batches, over the same memory every time and without a number for Python.

    That is what a CUDA graph can hold: `core.training.train` makes a new optimiser each time, and ends with its losses.

    Args:
        local: the client.
        net: its model, which is trained.
        batches: on the client's device.
    """

    def __init__(self, local: Session, net: ComponentModel, batches: Sequence[Batch]) -> None:
        self.kinds, self.net, self.batches = local.kinds, net.train(), batches
        self.optimizer, self.parameters = adamw(net.named_parameters(), Optimisation(1, 1e-4))
        for group in self.optimizer.param_groups:
            group["capturable"] = local.device.type == "cuda"

    def __call__(self) -> None:
        """Forward, backward, clipping and optimiser."""
        for batch in self.batches:
            self.optimizer.zero_grad(set_to_none=True)
            losses = self.kinds[batch.task].losses(self.net(batch.task, batch.inputs), batch.target)
            losses.mean().backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A function that replays `step` as one CUDA graph; on a processor, which has none, `step` itself."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def graph_rows(asked: Asked) -> Iterator[Row]:
    """A row for each model and way to run its step. On a processor nothing is compiled: that takes minutes there.

    `first s` holds what comes before the step can be repeated: compiling, or capturing. `peak GB` of a graph is that of its
    capture, since a replay allocates nothing.
    """
    device, dtype = asked.device, torch.bfloat16 if bfloat16_products() else torch.float32
    size = GRAPH_BATCH[asked.size]
    for model in ("flava", "vilt"):
        local = client(model, asked.size, PATTERN, size, LENGTH[asked.size], dtype, device=device)
        backbone, net = backbone_of(local), local.model()
        step = StaticStep(local, net, batches_of(local, size))
        flop = count_flop(step)
        for mode in ("eager", "compiled", "graph") if device.type == "cuda" else ("eager", "graph"):
            row: dict[str, Any] = {"model": model, "dtype": str(dtype).removeprefix("torch."), "batch": size}
            row["mode"] = mode if mode != "graph" or device.type == "cuda" else "graph: stand-in"
            backbone.compiled = mode == "compiled"
            try:
                reset_peak(device)
                began = time.perf_counter()
                run = captured(step, device) if mode == "graph" else step
                once(run, device)
                row["first s"] = time.perf_counter() - began
                peak = peak_bytes(device)
                row |= measured(run, dtype, device, REPEATS[asked.size], flop)
                if mode == "graph":
                    row["peak GB"] = peak / 1e9
            except RuntimeError as error:  # out of memory, or what a graph cannot hold
                row["note"] = str(error).partition("\n")[0]
            yield row
            if "note" in row:
                _free(net)
