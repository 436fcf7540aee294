"""One round's average: the weight that a reply has, and how long a client's difference may be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tap_flower.core.averaging import Averaging, check_form, clip, moved
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
        self._averaging.add(client, difference, manifest.weights)
        if longest is not None and longest < norm:
            log.warning(
                "the update of client %r has norm %g: scaled down to aggregation.clip_norm = %g", client, norm, longest
            )
            self._tell("clipped", client=client, norm=norm, clip_norm=longest)

    def finish(self) -> dict[str, Tensor]:
        """The server's new values (float32); a component that nobody returned keeps its values, bit for bit."""
        return moved(self._roster.tensors, self._averaging.means())
