"""Initial values: a tensor's first value depends on the run's seed, its name and its shape, and on nothing else.

The server and every client compute the same values on their own, whatever other tensors they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tap_flower.core.seeds import named_seed

Distribution = Literal["constant", "identity", "normal", "uniform"]
LARGEST_SCALE = 2.0**8
"""Initial values must have a smaller scale than this, which keeps them far below `averaging.LARGEST_VALUE`."""


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


def initial_values(
    module: nn.Module, special: Callable[[nn.Module, str], Initial | None] | None = None
) -> dict[str, Initial]:
    """Parameter name -> how it starts, by the type of the module that owns it; as PyTorch's own where nothing else is said.

    Linear and convolution: uniform ± 1/√fan_in. LayerNorm: 1 and 0. A module whose class has a dictionary `INITIALS`
    (name of a parameter of its own, or of a part's as `part.name` -> Initial) says for these itself.

    Args:
        module: with any parameters; what is frozen is looked at as well.
        special: (a part of the module, name of one of its own parameters) -> how that starts, or None where this function
            is to say.

    Raises:
        TypeError: no initial value is defined for a type; the message says how to give one.
    """
    initials: dict[str, Initial] = {}
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        stated: Mapping[str, Initial] = getattr(part, "INITIALS", {})
        for name, initial in stated.items():
            initials.setdefault(f"{prefix}{name}", initial)
        for name, parameter in part.named_parameters(recurse=False):
            if f"{prefix}{name}" in initials:
                continue
            found = (special and special(part, name)) or _by_type(part, name)
            if found is None:
                kind = type(part).__name__
                raise TypeError(
                    f"no initial value is defined for {kind}.{name} {tuple(parameter.shape)}: give class {kind} an "
                    f"INITIALS = {{{name!r}: Initial(...)}}"
                )
            initials[f"{prefix}{name}"] = found
    return initials


def _by_type(part: nn.Module, name: str) -> Initial | None:
    """How a parameter of one of PyTorch's own modules starts."""
    if isinstance(part, nn.Linear | nn.modules.conv._ConvNd):
        return Initial("uniform", 1 / math.sqrt(part.weight[0].numel()))
    if isinstance(part, nn.LayerNorm):
        return Initial("constant", 0.0 if name == "bias" else 1.0)
    return None
