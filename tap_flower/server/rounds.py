"""The averaging of one round: which weight a reply has, and how long a client's update may be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from tap_flower.core.averaging import Aggregator
from tap_flower.core.clipping import clip
from tap_flower.server.roster import Roster

Tell = Callable[..., Any]
"""(event, its values) -> nothing: writes an event."""
log = logging.getLogger("tap_flower")


class Average(Protocol):
    """What the strategy needs of the averaging of a round."""

    def add(self, client: str, update: Mapping[str, Tensor], unchanged: Iterable[str]) -> None:
        """Folds in a client's reply, or refuses it without a trace.

        Args:
            client: name.
            update: tensor name -> value that it returned.
            unchanged: components that training left as they were.

        Raises:
            BadUpdateError: the values cannot be used.
            MessageError: the client has no such component.
        """
        ...

    def finish(self) -> tuple[dict[str, Tensor], set[str]]:
        """The server's new tensors, and the components that have new values."""
        ...


class WeightedAverage:
    """Each component's mean over the clients that return it, weighted by their examples.

    Args:
        roster: of the run.
        names: the clients of the round.
        clip_norm: largest L2 norm of an update, returned minus sent, over all its tensors together; None: any.
        tell: is told of each update that was longer.
    """

    def __init__(self, roster: Roster, names: list[str], clip_norm: float | None, tell: Tell) -> None:
        self._roster, self._clip_norm, self._tell = roster, clip_norm, tell
        self._aggregator = Aggregator(roster.tensors, roster.component_of, roster.expected_examples(names))

    def add(self, client: str, update: Mapping[str, Tensor], unchanged: Iterable[str]) -> None:
        """See `Average`."""
        manifest, tensors, longest = self._roster.manifests[client], self._roster.tensors, self._clip_norm
        asked, norm = manifest.tensors_without(unchanged), 0.0
        if longest is not None:
            self._aggregator.check_form(client, update, asked)
            change, norm = clip({name: value - tensors[name] for name, value in update.items()}, longest)
            if longest < norm:
                update = {name: tensors[name] + value for name, value in change.items()}
        self._aggregator.add(client, update, asked, manifest.examples_per_component)
        if longest is not None and longest < norm:
            log.warning(
                "the update of client %r has norm %g: scaled down to aggregation.clip_norm = %g", client, norm, longest
            )
            self._tell("clipped", client=client, norm=norm, clip_norm=longest)

    def finish(self) -> tuple[dict[str, Tensor], set[str]]:
        """See `Average`."""
        return self._aggregator.result(), self._aggregator.changed
