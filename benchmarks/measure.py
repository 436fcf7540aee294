"""What every benchmark measures with: seconds, floating-point operations, memory, and a table of ratios."""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

Row = Mapping[str, Any]
"""Column -> value, of a table of results."""


def synchronize(device: torch.device) -> None:
    """Waits for all work that was given to a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of `run`, after one run that does not count."""
    run()
    return median(once(run, device) for _ in range(repeats))


def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large matrix product, again and again for a second: a mean, like a step's, which lasts as long.

    The matrices are the largest, up to a side of 2048 (8192 on a GPU), whose product is expected within two seconds: a
    processor without kernels for the dtype would take a minute.
    """
    n, largest = 256, 8192 if device.type == "cuda" else 2048
    while True:
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        out = torch.empty_like(a)
        expected = seconds(partial(torch.mm, a, b, out=out), device, 1)
        if n == largest or expected * 2**3 > 2:
            break
        n *= 2
    count = max(1, round(1 / expected))

    def products() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    return count * 2 * n**3 / once(products, device)


def _attention_flop(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products, [T, d] x [d, T] and [T, T] x [T, d], for each head."""
    batch, heads, tokens, size = query
    return 2 * batch * heads * tokens * key[2] * (size + value[3])


def _attention_backward_flop(gradient: Sequence[int], *shapes: Any, **_: Any) -> int:
    """Five products: the attention matrix again, and the gradients of value, matrix, query and key."""
    del gradient
    return _attention_flop(*shapes) * 5 // 2


# The counter of PyTorch knows attention kernels of GPUs only.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}


def count_flop(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in `run`."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def reset_peak(device: torch.device) -> None:
    """Begins a new measurement of `peak_bytes`, from what is alive."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory stays with this process otherwise, and holes in it count
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Largest memory since `reset_peak`: allocated by torch on a GPU, resident of the whole process on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results, with machine and command, here")
    return made


def show(rows: Sequence[Row], file: Path | None) -> None:
    """Prints results as a table, and writes them as JSON where a file is given."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(cell, row.values()))
    Console().print(table)
    if file is not None:
        file.write_text(json.dumps(origin() | {"machine": machine(), "rows": rows}, indent=1))


def cell(value: object) -> str:
    """A value as a table shows it: numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(rows: Sequence[Row]) -> str:
    """A table for `RESULTS.md`; a row that lacks a column of another one has an empty cell there."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin() -> dict[str, str]:
    """The command that is running, and the commit of this folder."""
    return {"command": " ".join(sys.orig_argv[1:]), "commit": _commit()}


def machine() -> str:
    """What this ran on, in words."""
    gpu = f", {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if torch.cuda.is_available() else ""
    return f"{torch.get_num_threads()} threads, {_cpu()}{gpu}, torch {torch.__version__}"


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"
