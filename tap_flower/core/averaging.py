"""Averaging: every component over the clients that hold it, streamed, and independent of the order of arrival."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_FRACTION_BITS = 39
"""Weighted values are rounded to multiples of 2^-39 (1.8e-12), the unit of the sums."""
LARGEST_VALUE = 2.0**12
"""Magnitude from which on a value is refused: weighted and in units of 2^-39, all that are smaller lie below 2^51."""
_BIAS = 1.5 * 2.0**52
"""A float64 in [2^52, 2^53) is an integer, so _BIAS + v, with |v| < 2^51, is _BIAS plus v rounded to an integer."""
_NEXT_BIAS = {False: torch.tensor(_BIAS, dtype=torch.float64), True: torch.tensor(-_BIAS, dtype=torch.float64)}
"""Whether a sum holds _BIAS -> what the next update is rounded with."""
_BLOCK = 1 << 17
"""Values that are converted, checked, rounded and added at a time: they stay in the processor's cache."""


class BadUpdateError(ValueError):
    """A client's update cannot be used; the message names the client, the tensor, the value and the remedy."""


class Aggregator:
    """The weighted mean of one round: θ_c = Σ_i n_ic θ_ic / Σ_i n_ic over the clients i that answered for component c.

    n_ic is the number of examples of client i's pairs that reach component c. Where i left c as it was and out of its
    update, θ_ic is the previous value, weighted once for all such clients. Updates are added one by one and not kept.
    E being the examples that are expected of the component, and s the power of two in [E/2^39, 2E/2^39), n_ic θ_ic / s is
    rounded to an integer v_i, half to even, and the integers are summed in float64. There |Σ v_i| < 2^51 is exact: the
    result is the same, bit for bit, in whatever order the replies arrive, and what was added can be taken back without a
    trace. Rounding moves the mean of k clients by less than k · 2^-38 (3.7e-12) over the share of E that has arrived;
    then it is rounded to the tensor's dtype.

    A sum holds ±_BIAS + Σ v_i or Σ v_i in turns: adding θ n/s to ±_BIAS rounds it, and the next bias takes the last away.

    Args:
        previous: tensor name -> current value on the server (float32). Shapes and names are checked against it.
        component_of: tensor name -> component.
        expected: component -> sum of the examples of all clients that were asked for it this round.
    """

    def __init__(
        self, previous: Mapping[str, Tensor], component_of: Mapping[str, str], expected: Mapping[str, int]
    ) -> None:
        self._previous = previous
        self._component_of = component_of
        self._expected = expected
        # A power of two keeps the scaling exact.
        self._scale = {c: 2.0 ** (_FRACTION_BITS - math.ceil(math.log2(n))) for c, n in expected.items() if n > 0}
        self._sums: dict[tuple[str, ...], _Sum] = {}
        self._arrived: dict[str, int] = {}
        self._unchanged: dict[str, int] = {}
        self._buffer = torch.empty(_BLOCK, dtype=torch.float64)

    def add(self, client: str, update: Mapping[str, Tensor], asked: set[str], weights: Mapping[str, int]) -> None:
        """Folds in one client's update, or refuses it; a refused one leaves no trace.

        Args:
            client: name, for the message.
            update: tensor name -> value (float32).
            asked: the names of the tensors that the update must hold.
            weights: component -> number of examples of the client's pairs that reach it. A component without a tensor in
                the update counts with its previous value: training left it unchanged.

        Raises:
            BadUpdateError: a tensor is missing or unknown, has another shape or dtype, or holds a value that is not finite
                or too large; a weight is negative, or with those before it above what the round expects.
        """
        self.check_form(client, update, asked)
        parts: dict[str, list[str]] = {}
        for name in update:
            parts.setdefault(self._component_of[name], []).append(name)
        for component in weights.keys() | parts.keys():
            self._check_weight(client, component, weights[component])
        folded = [(self._sum(component, names), weights[component]) for component, names in parts.items()]
        steps = [
            (block, weight * sum_.scale, _NEXT_BIAS[sum_.biased])
            for sum_, weight in folded
            if weight
            for block in sum_.blocks
        ]
        for number, (block, factor, bias) in enumerate(steps):
            if not block.add(update, factor, bias):
                for earlier, its_factor, its_bias in steps[:number]:
                    earlier.add(update, -its_factor, -its_bias)
                raise BadUpdateError(f"client {client!r}: {_out_of_range(update)}")
        for sum_, weight in folded:
            if weight:
                sum_.weight += weight
                sum_.biased = not sum_.biased
        for component, weight in weights.items():
            self._arrived[component] = self._arrived.get(component, 0) + weight
            if component not in parts:
                self._unchanged[component] = self._unchanged.get(component, 0) + weight

    def result(self) -> dict[str, Tensor]:
        """The new server tensors (float32): means where something arrived, the previous value, bit for bit, elsewhere."""
        sums: dict[str, list[tuple[Tensor, int]]] = {}
        for sum_ in self._sums.values():
            if sum_.weight:
                for name, total in sum_.totals().items():
                    sums.setdefault(name, []).append((total, sum_.weight))
        merged: dict[str, Tensor] = {}
        for name, previous in self._previous.items():
            merged[name] = previous
            if name in sums:
                component = self._component_of[name]
                scale, unchanged = self._scale[component], self._unchanged.get(component, 0)
                total = torch.stack([total for total, _ in sums[name]]).sum(0)
                if unchanged:
                    total += previous.reshape(-1).double().mul_(unchanged * scale).round_()
                total /= (sum(weight for _, weight in sums[name]) + unchanged) * scale
                merged[name] = total.to(previous.dtype).view(previous.shape)
        return merged

    @property
    def changed(self) -> set[str]:
        """The components that somebody returned with new values."""
        return {self._component_of[name] for names, sum_ in self._sums.items() if sum_.weight for name in names}

    def check_form(self, client: str, update: Mapping[str, Tensor], asked: set[str]) -> None:
        """Refuses an update that has not the tensors, shapes and dtypes that were asked for; `add` does so, too.

        Raises:
            BadUpdateError: with what is wrong.
        """
        check_form(f"client {client!r}: the reply", update, asked, self._previous)

    def _check_weight(self, client: str, component: str, weight: int) -> None:
        rest = self._expected.get(component, 0) - self._arrived.get(component, 0)
        if not 0 <= weight <= rest:
            raise BadUpdateError(
                f"client {client!r}: component {component!r} has weight {weight}, "
                f"not between 0 and the {rest} examples of this round that have not arrived"
            )

    def _sum(self, component: str, names: list[str]) -> _Sum:
        """The sum that these tensors of a component go into; clients that hold the same ones share it."""
        key = tuple(sorted(names))
        if key not in self._sums:
            shapes = {name: self._previous[name].shape for name in key}
            self._sums[key] = _Sum(shapes, self._scale.get(component, 0.0), self._buffer)
        return self._sums[key]


@dataclass(frozen=True)
class _Block:
    """A stretch of a sum.

    Attributes:
        total: float64 [n], of the sum.
        values: float64 [n], where an update's values are worked on.
        pieces: (a part of `values`, a tensor's name, which of its values or None for all).
    """

    total: Tensor
    values: Tensor
    pieces: list[tuple[Tensor, str, slice | None]]

    def add(self, update: Mapping[str, Tensor], factor: float, bias: Tensor) -> bool:
        """Adds factor · update + bias, rounded; False, and nothing is added, where a value is out of range."""
        for place, name, part in self.pieces:
            place.copy_(update[name] if part is None else update[name].reshape(-1)[part])
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
        scale: of the weights, to units of 2^-39.
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
        """Tensor name -> its sum, flat."""
        exact = self.total - _BIAS if self.biased else self.total
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
        BadUpdateError: a tensor is missing or unknown, or has another shape or dtype.
    """
    if missing := sorted(set(asked) - tensors.keys()):
        raise BadUpdateError(f"{message} lacks {len(missing)} tensors, such as {missing[0]!r}")
    if unknown := sorted(tensors.keys() - set(asked)):
        raise BadUpdateError(f"{message} holds {len(unknown)} tensors that were not sent, such as {unknown[0][:300]!r}")
    for name, tensor in tensors.items():
        if tensor.shape != like[name].shape:
            raise BadUpdateError(
                f"{message}'s tensor {name!r} has shape {tuple(tensor.shape)}, not {tuple(like[name].shape)}"
            )
        if tensor.dtype != like[name].dtype:
            raise BadUpdateError(f"{message}'s tensor {name!r} is {tensor.dtype}, not {like[name].dtype}")


def _in_range(values: Tensor) -> bool:
    return float(values.abs().max()) < LARGEST_VALUE


def _out_of_range(update: Mapping[str, Tensor]) -> str:
    """Which tensor holds what is refused."""
    name = next(name for name, tensor in update.items() if tensor.numel() and not _in_range(tensor))
    largest = float(update[name].abs().max())
    if not math.isfinite(largest):
        return f"tensor {name!r} holds a value that is not finite"
    return f"tensor {name!r} holds {largest:g}; values from {LARGEST_VALUE:g} on are refused"
