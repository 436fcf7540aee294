"""Averaging: the mean difference of each component over the clients that hold it; clipping; noise for privacy.

What a client returns is a difference, Δ = trained − received. The server's new value of component c is
θ_c + Σ_i n_ic Δ_ic / Σ_i n_ic over the clients i that hold c (Lee et al., arXiv 2509.26524, Section 3).
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tap_flower.errors import MessageError

_FRACTION_BITS = 39
"""A difference of weight 1, alone in its round, is rounded to multiples of 2^-39 (1.8e-12), the unit of its sum."""
LARGEST_WEIGHT = 2**31
"""Examples of one client in all; more are refused."""
LARGEST_VALUE = 2.0**12
"""Magnitude from which on a value is refused: all that are smaller, weighted and in units of their sum, lie below 2^51."""
_BIAS = 1.5 * 2.0**52
"""A float64 in [2^52, 2^53) is an integer, so _BIAS + v, with |v| < 2^51, is _BIAS plus v rounded to an integer."""
_NEXT_BIAS = {False: torch.tensor(_BIAS, dtype=torch.float64), True: torch.tensor(-_BIAS, dtype=torch.float64)}
"""Whether a sum holds _BIAS -> the bias that rounds the next difference."""
_BLOCK = 1 << 17
"""Values that are converted, checked, rounded and added at a time: they stay in the processor's cache."""
RandomBytes = Callable[[int], bytes]
"""Number of bytes -> as many random bytes."""
_DRAWN = 1 << 16
"""Values of noise that are drawn at a time."""


class Averaging:
    """The exact weighted mean of one round's differences, independent of the order in which they arrive.

    n_ic is the number of examples of client i's pairs that reach component c. Differences are added one by one and not
    kept, so that memory does not grow with the number of clients. A client's sum depends on its own weight alone: W being
    the smallest power of 16 that is not below n_ic, and K the smallest power of two that is not below the number of clients
    asked for the component, n_ic Δ_ic is rounded to a multiple of W K 2^-39, half to even, and added to the sum of W in
    float64. There less than 2^51 such multiples are exact: the result is the same, bit for bit, in whatever order the
    replies arrive; a refused difference is taken back without a trace; and whoever states many examples, answers or not,
    does not round away what others return. Rounding moves a client's Δ_ic by less than 16 K 2^-40, by 2^-40 K where all
    weights are 1.

    Args:
        like: tensor name -> tensor with the shape and dtype (float32) that differences must have.
        component_of: tensor name -> component.
        asked: component -> how many of the clients that were asked this round hold it.
    """

    def __init__(self, like: Mapping[str, Tensor], component_of: Mapping[str, str], asked: Mapping[str, int]) -> None:
        self._like = like
        self._component_of = component_of
        self._asked = asked
        self._sums: dict[tuple[int, tuple[str, ...]], _Sum] = {}
        self._arrived: Counter[str] = Counter()
        self._buffer = torch.empty(_BLOCK, dtype=torch.float64)

    def add(self, client: str, difference: Mapping[str, Tensor], weights: Mapping[str, int]) -> None:
        """Adds one client's difference, or refuses it without a trace.

        Args:
            client: name of the client, for error messages.
            difference: tensor name -> Δ (float32), for exactly the tensors that the client exchanges; see `check_form`.
            weights: component -> n_ic, for each component of these tensors.

        Raises:
            MessageError: a value is not finite or too large, a weight is negative or above `LARGEST_WEIGHT`, or more
                clients answer for a component than were asked.
        """
        parts: dict[str, list[str]] = {}
        for name in difference:
            parts.setdefault(self._component_of[name], []).append(name)
        for component in parts:
            self._check_weight(client, component, weights[component])
        folded = [(self._sum(c, weights[c], names), weights[c]) for c, names in parts.items() if weights[c]]
        # An addition alternates between rounding with +_BIAS and taking the bias away with -_BIAS.
        steps = [
            (block, weight * sum_.scale, _NEXT_BIAS[sum_.biased]) for sum_, weight in folded for block in sum_.blocks
        ]
        for number, (block, factor, bias) in enumerate(steps):
            if not block.add(difference, factor, bias):
                for earlier, its_factor, its_bias in steps[:number]:  # exact sums: this leaves no trace
                    earlier.add(difference, -its_factor, -its_bias)
                raise MessageError(f"client {client!r}: {_out_of_range(difference)}")
        for sum_, weight in folded:
            sum_.weight += weight
            sum_.biased = not sum_.biased
        self._arrived.update(parts.keys())

    def means(self, divisors: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """The mean difference of each tensor that some client returned.

        Args:
            divisors: tensor name -> number that its sum is divided by; by default the sum of the weights that arrived.

        Returns:
            Tensor name -> mean difference (float64, the tensor's shape).
        """
        totals: dict[str, Tensor] = {}
        weights: Counter[str] = Counter()
        for _, sum_ in sorted(self._sums.items(), key=lambda item: item[0]):  # not in the order of arrival
            if sum_.weight:
                for name, total in sum_.totals().items():
                    totals[name] = totals[name] + total if name in totals else total
                    weights[name] += sum_.weight
        return {
            name: (total / (weights if divisors is None else divisors)[name]).view(self._like[name].shape)
            for name, total in totals.items()
        }

    def _check_weight(self, client: str, component: str, weight: int) -> None:
        if not 0 <= weight <= LARGEST_WEIGHT:
            raise MessageError(
                f"client {client!r}: component {component!r} has weight {weight}, not between 0 and {LARGEST_WEIGHT}"
            )
        if self._arrived[component] >= self._asked.get(component, 0):
            raise MessageError(
                f"client {client!r}: component {component!r} was returned by more clients than the "
                f"{self._arrived[component]} that were asked for it"
            )

    def _sum(self, component: str, weight: int, names: list[str]) -> _Sum:
        """The sum that a client's tensors of a component go into, shared by those of like weight that hold the same ones."""
        largest = next(size for size in (16**power for power in itertools.count()) if size >= weight)
        key = largest, tuple(sorted(names))
        if key not in self._sums:
            clients = 1 << (self._asked[component] - 1).bit_length()
            # A power of two keeps the scaling exact.
            scale = 2.0**_FRACTION_BITS / (largest * clients)
            self._sums[key] = _Sum({name: self._like[name].shape for name in key[1]}, scale, self._buffer)
        return self._sums[key]


def moved(values: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The server's new values, θ + mean difference; a tensor without a mean keeps its value, bit for bit.

    Args:
        values: tensor name -> θ (float32).
        means: tensor name -> mean difference (float64), from `Averaging.means`.
    """
    return {n: value if n not in means else (value.double() + means[n]).to(value.dtype) for n, value in values.items()}


@dataclass(frozen=True)
class _Block:
    """A stretch of a sum.

    Attributes:
        total: float64 [n], of the sum.
        values: float64 [n], where a difference's values are worked on.
        pieces: (a part of `values`, a tensor's name, which of its values or None for all).
    """

    total: Tensor
    values: Tensor
    pieces: list[tuple[Tensor, str, slice | None]]

    def add(self, difference: Mapping[str, Tensor], factor: float, bias: Tensor) -> bool:
        """Adds factor · difference + bias, rounded; False, and nothing is added, where a value is out of range."""
        for place, name, part in self.pieces:
            place.copy_(difference[name] if part is None else difference[name].reshape(-1)[part])
        # A sum of squares is never below any of them, rounded or not, and NaN compares as false.
        if not (float(torch.dot(self.values, self.values)) < LARGEST_VALUE**2 or _in_range(self.values)):
            return False
        torch.add(bias, self.values, alpha=factor, out=self.values)
        self.total.add_(self.values)
        return True


@dataclass
class _Sum:
    """The sum of some tensors of one component over the clients that returned exactly these.

    Attributes:
        shapes: of the tensors, by name.
        scale: units of the sum in a value of weight 1.
        buffer: float64 [_BLOCK], shared by all sums.
        weight: examples so far.
        biased: whether the total holds _BIAS too.
        total: float64 [n], all tensors one after the other.
        blocks: of the total.
    """

    shapes: Mapping[str, torch.Size]
    scale: float
    buffer: Tensor
    weight: int = 0
    biased: bool = False
    total: Tensor = field(init=False)
    blocks: list[_Block] = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(sum(shape.numel() for shape in self.shapes.values()), dtype=torch.float64)
        self.blocks = [self._block(start) for start in range(0, len(self.total), _BLOCK)]

    def totals(self) -> dict[str, Tensor]:
        """Tensor name -> its weighted sum, flat."""
        exact = (self.total - _BIAS if self.biased else self.total) / self.scale
        sizes = [shape.numel() for shape in self.shapes.values()]
        return dict(zip(self.shapes, torch.split(exact, sizes), strict=True))

    def _block(self, start: int) -> _Block:
        total = self.total[start : start + _BLOCK]
        stop = start + len(total)
        pieces: list[tuple[Tensor, str, slice | None]] = []
        ends = itertools.accumulate(shape.numel() for shape in self.shapes.values())
        for (name, shape), end in zip(self.shapes.items(), ends, strict=True):
            begin = end - shape.numel()
            first, last = max(begin, start), min(end, stop)
            if first < last:
                place = self.buffer[first - start : last - start]
                whole = (first, last) == (begin, end)
                pieces.append(
                    (place.view(shape), name, None) if whole else (place, name, slice(first - begin, last - begin))
                )
        return _Block(total, self.buffer[: len(total)], pieces)


def check_form(message: str, tensors: Mapping[str, Tensor], asked: Collection[str], like: Mapping[str, Tensor]) -> None:
    """Checks the names, shapes and dtypes of tensors that came.

    Args:
        message: begins the errors.
        tensors: what came.
        asked: the names that must be there.
        like: name -> a tensor of the right shape and dtype, for all of these.

    Raises:
        MessageError: a tensor is missing or unknown, or has another shape or dtype.
    """
    if missing := sorted(set(asked) - tensors.keys()):
        raise MessageError(f"{message} lacks {len(missing)} tensors, such as {missing[0]!r}")
    if unknown := sorted(tensors.keys() - set(asked)):
        raise MessageError(f"{message} holds {len(unknown)} tensors that were not sent, such as {unknown[0][:300]!r}")
    for name, tensor in tensors.items():
        if tensor.shape != like[name].shape:
            raise MessageError(
                f"{message}'s tensor {name!r} has shape {tuple(tensor.shape)}, not {tuple(like[name].shape)}"
            )
        if tensor.dtype != like[name].dtype:
            raise MessageError(f"{message}'s tensor {name!r} is {tensor.dtype}, not {like[name].dtype}")


def _in_range(values: Tensor) -> bool:
    return float(values.abs().max()) < LARGEST_VALUE


def _out_of_range(update: Mapping[str, Tensor]) -> str:
    """Which tensor holds what is refused."""
    name = next(name for name, tensor in update.items() if tensor.numel() and not _in_range(tensor))
    largest = float(update[name].abs().max())
    if not math.isfinite(largest):
        return f"tensor {name!r} holds a value that is not finite"
    return (
        f"tensor {name!r} holds {largest:g}; values of {LARGEST_VALUE:g} or more are refused: scale the inputs, lower the "
        f"learning rate, or use buffers='personal'"
    )


def clip(change: Mapping[str, Tensor], longest: float) -> tuple[dict[str, Tensor], float]:
    """Scales a client's change Δ to min(1, longest / ‖Δ‖₂) · Δ, the norm being that of all its tensors together.

    Args:
        change: tensor name -> returned value minus the value that was sent (float32, any shapes).
        longest: the largest L2 norm, above 0.

    Returns:
        The change (float32), and its norm before. A change whose norm is not finite comes back as it is: it cannot be
        scaled, and is to be refused.
    """
    squares = [float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 for tensor in change.values()]
    norm = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf
    if not longest < norm < math.inf:
        return dict(change), norm
    # In float64: a factor may be too small for float32.
    return {name: (tensor.double() * (longest / norm)).to(tensor.dtype) for name, tensor in change.items()}, norm


def holders_needed(noise_multiplier: float, max_noise: float) -> int:
    """The smallest m with z / m ≤ max_noise: with fewer holders in a round, a component's mean is too noisy to be of use."""
    return max(1, math.ceil(noise_multiplier / max_noise))


def sensitivity(clip_norm: float, holders: int, values: int) -> float:
    """By how much one client moves the sums of a round, in L2: C, and a little for what is rounded on the way.

    Taking a client out, that is putting a difference of zero in its place, moves the sums of all components, seen as one
    vector, by C at most. Noise of standard deviation z · C on every value of the sums makes the round one Gaussian mechanism
    with the noise multiplier z; the mean of a tensor with m_t holders then has noise of z · C / m_t. Clipped differences
    are float32, which is 2^-24 off, relatively. In sums every value is off by less than holders · 2^-39 (`Averaging`).

    Args:
        clip_norm: C.
        holders: the most that any component has in the round.
        values: of all tensors together.
    """
    return clip_norm * (1.0 + holders * 2.0**-22) + math.sqrt(values) * holders * 2.0**-39


def gaussian(count: int, random_bytes: RandomBytes = os.urandom) -> Tensor:
    """Independent standard normal values (float64 [count]).

    Each value is the normal quantile of 52 bits of the operating system's secure random numbers. A generator of torch is
    out of the question: on the CPU it has 2^32 different states to start from, which can all be tried.

    Args:
        count: of the values.
        random_bytes: where the randomness comes from; another source is for tests.
    """
    bits = torch.frombuffer(bytearray(random_bytes(8 * count)), dtype=torch.int64) if count else torch.empty(0)
    # The middles of 2^52 equal parts of (0, 1): none is 0 or 1, and all are exact.
    uniform = (bits.long() & (2**52 - 1)).double().add_(0.5).mul_(2.0**-52)
    normal: Tensor = torch.special.ndtri(uniform)
    return normal


def release(
    values: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    holders: Mapping[str, int],
    noise: float,
    random_bytes: RandomBytes = os.urandom,
) -> dict[str, Tensor]:
    """The server's values after a private round: θ_t + Δ̄_t + N(0, (noise / m_t)²) for each released tensor t.

    Args:
        values: tensor name -> θ (float32).
        means: tensor name -> sum of the clipped differences over the m_t holders, divided by m_t (float64); a tensor that
            nobody returned is missing and counts as zero.
        holders: tensor name -> m_t, for the tensors that are released; all others keep their values, bit for bit.
        noise: standard deviation of the noise on a sum, z · C.
        random_bytes: source of the randomness, see `gaussian`.
    """
    released = dict(values)
    for name, value in values.items():
        if (count := holders.get(name)) is not None:
            flat = (value.double() + means.get(name, 0.0)).flatten()
            for part in torch.split(flat, _DRAWN):  # views: they are changed in place
                part.add_(gaussian(len(part), random_bytes), alpha=noise / count)
            released[name] = flat.view(value.shape).to(value.dtype)
    return released
