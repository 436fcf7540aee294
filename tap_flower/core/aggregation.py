"""Averaging: every component over the clients that hold it, streamed, and independent of the order of arrival."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_FRACTION_BITS = 40
"""Weighted values are rounded to multiples of 2^-40 (9e-13)."""
LARGEST_VALUE = 2.0**12
"""Magnitude from which on a value is refused: sums of multiples of 2^-40 are exact in float64 below 2^13."""
_CHUNK = 1 << 16


class BadUpdateError(ValueError):
    """A client's update cannot be used; the message names the client, the tensor, the value and the remedy."""


class Aggregator:
    """The weighted mean of one round: θ_c = Σ_i n_ic θ_ic / Σ_i n_ic over the clients i that returned component c.

    n_ic is the number of examples of client i's pairs that reach component c. Updates are added one by one and not kept.
    A weighted value is rounded to a multiple of 2^-40 before it is added to a float64 sum, in which such multiples add up
    without error: the result is the same, bit for bit, in whatever order the replies arrive. The rounding error of a mean
    is below 1e-12 per client.

    Args:
        previous: tensor name -> current value on the server (float32). Shapes and names are checked against it.
        component_of: tensor name -> component.
        expected: component -> sum of the examples of all clients that were asked for it this round. It scales the weights.
    """

    def __init__(
        self, previous: Mapping[str, Tensor], component_of: Mapping[str, str], expected: Mapping[str, int]
    ) -> None:
        self._previous = previous
        self._component_of = component_of
        # A power of two keeps the scaling exact.
        self._scale = {c: 2.0 ** -math.ceil(math.log2(n)) for c, n in expected.items() if n > 0}
        self._expected = expected
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, int] = {}
        self._unchanged: dict[str, int] = {}

    def check(self, client: str, update: Mapping[str, Tensor], asked: set[str], weights: Mapping[str, int]) -> None:
        """Refuses an update that is not what `client` was asked for.

        Args:
            client: name, for the message.
            update: tensor name -> value, as `add` takes it.
            asked: the names of the tensors that were sent to the client.
            weights: component -> examples, as `add` takes it.

        Raises:
            BadUpdateError: a tensor is missing or unknown, has another shape or dtype, or is not finite; a weight is
                negative or above what the round expects.
        """
        if missing := sorted(asked - update.keys()):
            raise BadUpdateError(f"client {client!r}: the reply lacks {len(missing)} tensors, such as {missing[0]!r}")
        if unknown := sorted(update.keys() - asked):
            raise BadUpdateError(
                f"client {client!r}: the reply holds {len(unknown)} tensors that were not sent, such as {unknown[0]!r}"
            )
        for name, tensor in update.items():
            previous = self._previous[name]
            if tensor.shape != previous.shape:
                raise BadUpdateError(
                    f"client {client!r}: tensor {name!r} has shape {tuple(tensor.shape)}, not {tuple(previous.shape)}"
                )
            if tensor.dtype != previous.dtype:
                raise BadUpdateError(f"client {client!r}: tensor {name!r} is {tensor.dtype}, not {previous.dtype}")
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            if not math.isfinite(largest):
                raise BadUpdateError(f"client {client!r}: tensor {name!r} holds a value that is not finite")
            if largest >= LARGEST_VALUE:
                raise BadUpdateError(
                    f"client {client!r}: tensor {name!r} holds {largest:g}; values from {LARGEST_VALUE:g} on are refused"
                )
            component = self._component_of[name]
            if not 0 <= weights[component] <= self._expected.get(component, 0):
                raise BadUpdateError(
                    f"client {client!r}: component {component!r} has weight {weights[component]}, "
                    f"not between 0 and the {self._expected.get(component, 0)} examples of this round"
                )

    def add(self, update: Mapping[str, Tensor], weights: Mapping[str, int]) -> None:
        """Folds in one client's update, which `check` has accepted.

        Args:
            update: tensor name -> value (float32).
            weights: component -> number of examples of the client's pairs that reach it. A tensor of these components
                that is not in `update` counts with its previous value: the client returned it unchanged.
        """
        for name, component in self._component_of.items():
            if name not in update and weights.get(component, 0) > 0:
                self._unchanged[name] = self._unchanged.get(name, 0) + weights[component]
        for name, tensor in update.items():
            component = self._component_of[name]
            weight = weights[component]
            if weight == 0:
                continue
            if name not in self._sums:
                self._sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
                self._weights[name] = 0
            self._weights[name] += weight
            factor = weight * self._scale[component] * 2.0**_FRACTION_BITS
            values, sums = tensor.reshape(-1), self._sums[name].view(-1)
            for start in range(0, values.numel(), _CHUNK):
                part = slice(start, start + _CHUNK)
                sums[part] += values[part].double().mul_(factor).round_()

    def result(self) -> dict[str, Tensor]:
        """The new server tensors (float32): means where something arrived, the previous value elsewhere."""
        merged: dict[str, Tensor] = {}
        for name, previous in self._previous.items():
            if name in self._sums:
                scale = self._scale[self._component_of[name]] * 2.0**_FRACTION_BITS
                total, weight, unchanged = self._sums[name], self._weights[name], self._unchanged.get(name, 0)
                if unchanged:
                    total = total + previous.double().mul_(unchanged * scale).round_()
                merged[name] = (total / ((weight + unchanged) * scale)).to(previous.dtype)
            else:
                merged[name] = previous
        return merged

    @property
    def weights(self) -> dict[str, int]:
        """Tensor name -> examples of the clients that returned a new value, for the tensors that have one."""
        return dict(self._weights)

    @property
    def changed(self) -> set[str]:
        """The components that somebody returned with new values."""
        return {self._component_of[name] for name in self._sums}
