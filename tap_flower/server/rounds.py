"""One round's average: the weight that a reply has, and how long a client's difference may be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tap_flower.core.averaging import Averaging, check_form, clip, moved
from tap_flower.core.components import State
from tap_flower.errors import RunError
from tap_flower.methods.method import ServerHalf
from tap_flower.server.roster import Roster

Tell = Callable[..., Any]
"""(event, its values) writes an event."""
log = logging.getLogger("tap_flower")


class WeightedAverage:
    """Each component's mean difference over the clients that return it, weighted by their examples.

    Args:
        roster: clients and values of the run.
        names: the clients of the round.
        clip_norm: largest L2 norm of a client's difference, over all its tensors together; None: any.
        tell: is told of each difference that was longer.
    """

    def __init__(self, roster: Roster, names: list[str], clip_norm: float | None, tell: Tell) -> None:
        self._roster, self._clip_norm, self._tell = roster, clip_norm, tell
        self._averaging = Averaging(roster.tensors, roster.component_of, roster.holders(names))

    def add(self, client: str, difference: Mapping[str, Tensor]) -> None:
        """Adds a client's difference, or refuses it without a trace.

        Args:
            client: name of the client.
            difference: tensor name -> Δ (float32).

        Raises:
            MessageError: tensors are missing or unknown, or their values cannot be used.
        """
        manifest, longest = self._roster.manifests[client], self._clip_norm
        check_form(f"client {client!r}: the reply", difference, manifest.tensors, self._roster.tensors)
        norm = 0.0
        if longest is not None:
            difference, norm = clip(difference, longest)
        self._take(client, difference, manifest.weights)
        if longest is not None and longest < norm:
            log.warning(
                "the update of client %r has norm %g: scaled down to aggregation.clip_norm = %g", client, norm, longest
            )
            self._tell("clipped", client=client, norm=norm, clip_norm=longest)

    def _take(self, client: str, difference: Mapping[str, Tensor], weights: Mapping[str, int]) -> None:
        self._averaging.add(client, difference, weights)

    def finish(self) -> dict[str, Tensor]:
        """The server's new values (float32); a component that nobody returned keeps its values, bit for bit."""
        return moved(self._roster.tensors, self._averaging.means())


class MethodAverage(WeightedAverage):
    """A round's average where the method has a server half: a combination of its own, or a step of its own, or both.

    Args:
        half: what the method does with the differences.
        memory: what it has kept on the server; `finish` replaces it in place.
        server_round: counted from 1.
        others: arguments of `WeightedAverage`.
    """

    def __init__(self, half: ServerHalf, memory: State, server_round: int, *others: Any) -> None:
        super().__init__(*others)
        self._half, self._memory, self._round = half, memory, server_round
        self._kept: dict[str, list[tuple[Tensor, int]]] = {}

    def _take(self, client: str, difference: Mapping[str, Tensor], weights: Mapping[str, int]) -> None:
        super()._take(client, difference, weights)  # its checks are for all
        if self._half.combine is not None:
            for name, value in difference.items():
                self._kept.setdefault(name, []).append((value, weights[self._roster.component_of[name]]))

    def finish(self) -> dict[str, Tensor]:
        """The server's new values (float32).

        Raises:
            RunError: the method returned a tensor of another name or shape, or a value that is not finite.
        """
        means = {name: self._combined(kept) for name, kept in self._kept.items()} or self._averaging.means()
        moves: Mapping[str, Tensor] = means
        if self._half.step is not None:
            moves, kept = self._half.step(means, dict(self._memory), self._round)
            self._memory.clear()
            self._memory.update({name: value.float() for name, value in kept.items()})  # as a checkpoint keeps it
        for name, move in moves.items():
            known = name in means and move.shape == self._roster.tensors[name].shape
            if not known or not bool(move.isfinite().all()):
                raise RunError(
                    f"the method's server half gave {name!r} a value that is not finite, or of another name or shape than "
                    f"the mean difference: correct its `combine` or `step`"
                )
        return moved(self._roster.tensors, moves)

    def _combined(self, kept: list[tuple[Tensor, int]]) -> Tensor:
        assert self._half.combine is not None
        weights = torch.tensor([float(weight) for _, weight in kept], dtype=torch.float64)
        stacked = torch.stack([difference.double() for difference, _ in kept])
        return self._half.combine(stacked, weights / weights.sum())
