"""Differential privacy of a run: clients are protected from each other; the server is trusted. See the page on privacy."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tap_flower.core.averaging import Aggregator
from tap_flower.core.clipping import clip
from tap_flower.core.privacy import RandomBytes, release, sensitivity
from tap_flower.server.accounting import Budget, Ledger
from tap_flower.server.roster import Roster
from tap_flower.server.rounds import Tell

log = logging.getLogger("tap_flower")


class Privacy:
    """What a private run keeps from round to round, and says.

    Args:
        budget: of the run.
        ledger: of the run's progress; it is added to.
        random_bytes: where the noise comes from; another source is for tests.
    """

    def __init__(self, budget: Budget, ledger: Ledger, random_bytes: RandomBytes = os.urandom) -> None:
        self.budget = budget
        self.ledger = ledger
        self.random_bytes = random_bytes

    @property
    def epsilon(self) -> float:
        """ε that has been spent: that of the client that took part most often."""
        return self.budget.spent(max(self.ledger.clients.values(), default=0))

    def announce(self, roster: Roster, clients_per_round: int, tell: Tell) -> None:
        """Says at the start what the run does, and which components cannot be released with the clients that are there."""
        budget, holders = self.budget, _holders(roster, roster.names)
        never = {
            name: count for name, count in holders.items() if min(count, clients_per_round) < budget.holders_needed
        }
        if never:
            log.warning(
                "%d of %d components are held by too few of the clients that are there, and keep their values: %s",
                len(never), len(holders), _few(never, budget.holders_needed),
            )  # fmt: skip
        tell(
            "privacy",
            epsilon=budget.epsilon,
            delta=budget.delta,
            clip_norm=budget.clip_norm,
            noise_multiplier=budget.noise_multiplier,
            holders_needed=budget.holders_needed,
            never=never,
        )

    def average(self, roster: Roster, names: list[str], tell: Tell) -> PrivateAverage:
        """The averaging of a round over some clients."""
        return PrivateAverage(self, roster, names, tell)

    def spent(self, roster: Roster) -> dict[str, Any]:
        """What `results.json` says of it."""
        holders = _holders(roster, roster.manifests)
        return {
            "epsilon_requested": self.budget.epsilon,
            "delta": self.budget.delta,
            "clip_norm": self.budget.clip_norm,
            "noise_multiplier": self.budget.noise_multiplier,
            "holders_needed": self.budget.holders_needed,
            "epsilon": self.epsilon,
            "components": {
                component: {
                    "epsilon": self.budget.spent(max(self.ledger.holders.get(component, {}).values(), default=0)),
                    "holders": count,
                    "rounds": self.ledger.rounds.get(component, 0),
                }
                for component, count in sorted(holders.items())
            },
        }


class PrivateAverage:
    """Each component's mean change over its holders of the round, with noise; an `averaging.Average`.

    Every holder that was asked counts with weight 1: one that does not answer, or whose reply is refused, as a change of
    zero. A component with too few holders is not released.

    Args:
        privacy: of the run.
        roster: likewise.
        names: the clients of the round.
        tell: is told of the norms, and of the components that are not released.
    """

    def __init__(self, privacy: Privacy, roster: Roster, names: list[str], tell: Tell) -> None:
        self._privacy, self._roster, self._tell = privacy, roster, tell
        self._held = {name: set(roster.manifests[name].component_of.values()) for name in names}
        self._holders = _holders(roster, names)
        self._norms: dict[str, float] = {}
        # Changes are averaged, not values: rounding is then relative to what is clipped.
        zeros = {name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in roster.tensors.items()}
        self._aggregator = Aggregator(zeros, roster.component_of, self._holders)

    def add(self, client: str, update: Mapping[str, Tensor], unchanged: Iterable[str]) -> None:
        """See `averaging.Average`."""
        asked, tensors = self._roster.manifests[client].tensors_without(unchanged), self._roster.tensors
        self._aggregator.check_form(client, update, asked)
        change, norm = clip(
            {name: value - tensors[name] for name, value in update.items()}, self._privacy.budget.clip_norm
        )
        self._aggregator.add(client, change, asked, dict.fromkeys(self._held[client], 1))
        self._norms[client] = norm

    def finish(self) -> tuple[dict[str, Tensor], set[str]]:
        """See `averaging.Average`. What is released goes into the ledger."""
        privacy, budget, roster = self._privacy, self._privacy.budget, self._roster
        released = {c: count for c, count in self._holders.items() if count >= budget.holders_needed}
        withheld = {c: count for c, count in self._holders.items() if c not in released}
        values = sum(tensor.numel() for tensor in roster.tensors.values())
        moved = sensitivity(budget.clip_norm, max(self._holders.values(), default=0), values)
        noise, means = budget.noise_multiplier * moved, self._means()
        tensors = release(roster.tensors, means, roster.component_of, released, noise, privacy.random_bytes)
        privacy.ledger.take(self._held, released)
        if withheld:
            log.warning("%d components keep their values: %s", len(withheld), _few(withheld, budget.holders_needed))
        self._tell("privacy_round", norms=self._norms, withheld=withheld, holders_needed=budget.holders_needed)
        return tensors, set(released)

    def _means(self) -> dict[str, Tensor]:
        """The mean changes, without noise; whoever has not answered counts as a change of zero."""
        for name in self._held.keys() - self._norms.keys():
            self._aggregator.add(name, {}, set(), dict.fromkeys(self._held[name], 1))
        return self._aggregator.result()


def _holders(roster: Roster, names: Iterable[str]) -> dict[str, int]:
    """Component -> how many of some clients hold it, for those that any of them holds."""
    return dict(sorted(Counter(c for n in names for c in set(roster.manifests[n].component_of.values())).items()))


def _few(withheld: Mapping[str, int], needed: int) -> str:
    """Some components by name, with the holders that there are and that they would need."""
    shown = [f"{component!r} has {count} of {needed} clients" for component, count in list(withheld.items())[:3]]
    return ", ".join(shown) + (f" and {len(withheld) - 3} more (see metrics.jsonl)" if len(withheld) > 3 else "")
