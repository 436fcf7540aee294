"""`python -m benchmarks.aggregate [--clients N ...]`: the server's sum of differences against a plain copy of memory.

The differences have the tensors of a full-size FLAVA client of the paper's pattern 7; clients come one after the other, as
in a round, with two differences in turns. `share` is the bytes of differences that are checked and added in a second, over
the bytes that `torch.Tensor.copy_` copies in a second in the same process. `peak MB` is how far memory rose above what
differences and copy take.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor

from benchmarks.measure import parser, peak_bytes, reset_peak, show
from benchmarks.workload import client
from tap_flower.core.averaging import Averaging, check_form, moved

EXAMPLES = 1000
"""Training examples of each client."""


def main() -> None:
    """Prints a row for each number of clients."""
    options = parser(__doc__)
    options.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    given = options.parse_args()
    with torch.device("meta"):
        model = client("flava", "base", 7, 1, 1).outline
    component_of = model.component_map.component_of
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if name in component_of}
    differences = [{name: torch.randn(shape) / 10 for name, shape in shapes.items()} for _ in range(2)]
    cpu = torch.device("cpu")
    size = sum(tensor.nbytes for tensor in differences[0].values())
    source, copy = torch.randn(2, size // 4)
    reset_peak(cpu)
    before, rows = peak_bytes(cpu), []
    for clients in given.clients:
        reset_peak(cpu)
        averaging = Averaging(differences[0], component_of, dict.fromkeys(component_of.values(), clients))
        adding, copying = [], []
        for number in range(clients):
            adding.append(_add(averaging, differences[number % 2], component_of))
            copying.append(_copy(copy, source))
        moved(differences[0], averaging.means())  # what the values are does not matter
        peak = peak_bytes(cpu) - before
        rows.append(
            {
                "clients": clients,
                "tensors": len(shapes),
                "MB a difference": size / 1e6,
                "GB/s": size / median(adding) / 1e9,
                "copy GB/s": size / median(copying) / 1e9,
                "share": median(copying) / median(adding),
                "peak MB": peak / 1e6,
            }
        )
        del averaging
    show(rows, given.json)


def _add(averaging: Averaging, difference: Mapping[str, Tensor], component_of: Mapping[str, str]) -> float:
    """Seconds of checking and adding one difference."""
    weights = dict.fromkeys(component_of.values(), EXAMPLES)
    began = time.perf_counter()
    check_form("the reply", difference, component_of, difference)
    averaging.add("client", difference, weights)
    return time.perf_counter() - began


def _copy(copy: Tensor, source: Tensor) -> float:
    """Seconds of copying as many bytes."""
    began = time.perf_counter()
    copy.copy_(source)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
