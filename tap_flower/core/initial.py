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
LARGEST_SCALE = 2.0**8
"""Scale from which on an initial value is refused: no value of it is near `aggregation.LARGEST_VALUE`."""


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
        if not abs(self.scale) < LARGEST_SCALE:
            raise ValueError(f"the scale is {self.scale}: values from {LARGEST_SCALE:g} on are refused")
        if self.scale < 0 and self.distribution in ("normal", "uniform"):
            raise ValueError(f"the scale of distribution {self.distribution!r} is {self.scale}: it is never negative")

    def check(self, shape: tuple[int, ...]) -> None:
        """Checks that a tensor of this shape can start like this.

        Raises:
            ValueError: it cannot.
        """
        if self.distribution == "identity" and len(shape) not in (2, 3, 4, 5):
            raise ValueError(f"an identity has 2 to 5 dimensions, not those of {shape}")

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
