"""Initial values: a tensor's first value depends on the run's seed, its name and its shape, and on nothing else.

The server and every client compute the same values on their own, whatever other tensors they hold.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Distribution = Literal["constant", "identity", "normal", "uniform"]


@dataclass(frozen=True)
class Initial:
    """How a tensor starts.

    Attributes:
        distribution: `constant` (= scale), `identity` (a linear map or convolution that multiplies by scale), `normal` (mean
            0, standard deviation scale) or `uniform` (between ± scale).
        scale: see above.
    """

    distribution: Distribution
    scale: float

    def __post_init__(self) -> None:
        if self.distribution not in get_args(Distribution):
            raise ValueError(f"unknown distribution {self.distribution!r}: use one of {get_args(Distribution)}")

    def value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """The initial tensor (float32, on the CPU).

        Args:
            name: of the tensor.
            shape: of the tensor.
            seed: of the run.
        """
        tensor = torch.empty(shape, dtype=torch.float32)
        if self.distribution == "constant":
            return tensor.fill_(self.scale)
        if self.distribution == "identity":
            return (nn.init.eye_ if tensor.ndim == 2 else nn.init.dirac_)(tensor).mul_(self.scale)
        generator = torch.Generator().manual_seed(named_seed(seed, name))
        if self.distribution == "normal":
            return tensor.normal_(0.0, self.scale, generator=generator)
        return tensor.uniform_(-self.scale, self.scale, generator=generator)


def named_seed(seed: int, *names: object) -> int:
    """A seed for the random numbers that belong to `names`, below 2^63; unrelated for different names or seeds."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def initialise(model: nn.Module, initials: dict[str, Initial], seed: int) -> None:
    """Sets every trainable parameter of `model` to its initial value.

    Args:
        model: changed in place.
        initials: tensor name -> how it starts; a name for every trainable parameter.
        seed: of the run.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(initials[name].value(name, tuple(parameter.shape), seed))
