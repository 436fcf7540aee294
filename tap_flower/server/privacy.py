"""Differential privacy of a run: its budget, what has been spent of it, and the average of a private round.

Clients are protected from each other; the server is trusted. See the documentation's page on privacy.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from torch import Tensor

from tap_flower.config import Config
from tap_flower.core.averaging import Averaging, RandomBytes, check_form, clip, holders_needed, release, sensitivity
from tap_flower.errors import ConfigError
from tap_flower.plain import install
from tap_flower.server.roster import Roster
from tap_flower.server.rounds import Tell

log = logging.getLogger("tap_flower")


@dataclass
class Ledger:
    """Who took part in what was released. To have been asked is to take part: whether a client answered is its secret.

    Attributes:
        clients: client -> rounds in which it took part and something of a component that it holds was released.
        holders: component -> client -> rounds in which the client took part and the component was released.
        rounds: component -> rounds in which it was released.
    """

    clients: dict[str, int] = field(default_factory=dict)
    holders: dict[str, dict[str, int]] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)

    def take(self, held: Mapping[str, Collection[str]], released: Collection[str]) -> None:
        """Takes in a round.

        Args:
            held: client that was asked -> components that it holds.
            released: the components that got new values.
        """
        for component in released:
            self.rounds[component] = self.rounds.get(component, 0) + 1
        for client, components in held.items():
            own = sorted(set(components) & set(released))
            self.clients[client] = self.clients.get(client, 0) + bool(own)
            for component in own:
                counts = self.holders.setdefault(component, {})
                counts[client] = counts.get(client, 0) + 1


@dataclass(frozen=True)
class Budget:
    """A run's ε and δ, and the noise that follows from them.

    Attributes:
        epsilon: ε that was asked for.
        delta: δ.
        clip_norm: C.
        noise_multiplier: z, the smallest with ε(rounds) ≤ ε.
        holders_needed: holders that a component must have in a round to be released.
    """

    epsilon: float
    delta: float
    clip_norm: float
    noise_multiplier: float
    holders_needed: int

    def spent(self, releases: int) -> float:
        """ε after a client took part in a number of releases."""
        return _epsilon(self.noise_multiplier, self.delta, releases)


def budget_of(config: Config, most: int | None = None) -> Budget | None:
    """The budget of a run; None where it has no differential privacy.

    Args:
        config: of the run.
        most: the most clients that a round can have; by default `clients_per_round`, or all in the configuration.

    Raises:
        ConfigError: the package is not installed, or no round can ever have enough clients.
    """
    wanted = config.privacy
    if wanted.epsilon is None or not config.rounds:  # without a round nothing is released
        return None
    noise_multiplier = calibrate(wanted.epsilon, wanted.delta, config.rounds)
    needed = holders_needed(noise_multiplier, wanted.max_noise)
    if most is None:
        most = min(config.clients_per_round, len(config.clients) or config.clients_per_round)
    if needed > most:
        raise ConfigError(
            f"privacy.epsilon = {wanted.epsilon:g} over rounds = {config.rounds} takes a noise multiplier of "
            f"{noise_multiplier:.3g}; privacy.max_noise = {wanted.max_noise:g} then needs {needed} clients that hold a "
            f"component in one round, and a round has {most} (clients_per_round = {config.clients_per_round}, "
            f"{len(config.clients)} clients in the configuration): nothing would ever be released. Have more clients in a "
            f"round, fewer rounds, a larger epsilon, or from privacy.max_noise = {noise_multiplier / most:.3g} on"
        )
    return Budget(wanted.epsilon, wanted.delta, wanted.clip_norm, noise_multiplier, needed)


@cache
def calibrate(epsilon: float, delta: float, rounds: int) -> float:
    """The smallest noise multiplier z of `rounds` Gaussian mechanisms, composed, that are (ε, δ)-private: to 1e-6.

    Raises:
        ConfigError: the package `dp-accounting` is not installed, or it finds none.
    """
    accounting, accountant = _package()

    def events(noise_multiplier: float) -> Any:
        return accounting.SelfComposedDpEvent(accounting.GaussianDpEvent(noise_multiplier), rounds)

    try:
        return float(accounting.calibrate_dp_mechanism(accountant, events, epsilon, delta))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"privacy: no noise gives epsilon = {epsilon:g} at delta = {delta:g} over {rounds} rounds ({error}): "
            f"choose a larger epsilon or delta"
        ) from error


@cache
def _epsilon(noise_multiplier: float, delta: float, releases: int) -> float:
    """ε of the composition of Gaussian mechanisms (Rényi accountant)."""
    if not releases:
        return 0.0
    accounting, accountant = _package()
    return float(accountant().compose(accounting.GaussianDpEvent(noise_multiplier), releases).get_epsilon(delta))


def _package() -> tuple[Any, Any]:
    """The package, and its Rényi accountant."""
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ImportError as error:
        raise ConfigError(
            f"privacy.epsilon is set, and the package dp-accounting is not installed ({error}): {install('privacy')}"
        ) from error
    return dp_accounting, RdpAccountant


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

    def announce(self, roster: Roster, round_size: int, tell: Tell) -> None:
        """Says at the start what the run does, and which components cannot be released with the clients that are there.

        Args:
            roster: the clients.
            round_size: how many of them train in a round.
            tell: is told of it.
        """
        budget, holders = self.budget, _fewest(_holders(roster, roster.names), roster)
        never = {name: count for name, count in holders.items() if min(count, round_size) < budget.holders_needed}
        if never:
            log.warning(
                "%d of %d components are held by too few of the clients that are there, and keep their values: %s",
                len(never), len(holders), _few(never, budget.holders_needed),
            )  # fmt: skip
        tell("privacy", **asdict(budget), never=never)

    def spent(self, roster: Roster) -> dict[str, Any]:
        """What `results.json` says of it."""
        holders = roster.holders(roster.manifests)
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
    """Each tensor's mean difference over its holders of the round, with noise; used in place of a `WeightedAverage`.

    Every holder that was asked counts with weight 1: one that does not answer, or whose reply is refused, as a difference of
    zero. A tensor with too few holders is not released; clients with modules of different depth may share a component and
    not all of its tensors.

    Args:
        privacy: budget and ledger of the run.
        roster: clients and values of the run.
        names: the clients of the round.
        tell: is told of the norms, and of the components that are not released.
    """

    def __init__(self, privacy: Privacy, roster: Roster, names: list[str], tell: Tell) -> None:
        self._privacy, self._roster, self._tell = privacy, roster, tell
        self._held = {name: set(roster.manifests[name].component_of.values()) for name in names}
        self._holders = _holders(roster, names)
        self._norms: dict[str, float] = {}
        self._averaging = Averaging(roster.tensors, roster.component_of, roster.holders(names))

    def add(self, client: str, difference: Mapping[str, Tensor]) -> None:
        """Adds a client's difference, clipped, or refuses it without a trace.

        Args:
            client: name of the client.
            difference: tensor name -> Δ (float32).

        Raises:
            MessageError: tensors are missing or unknown, or their values cannot be used.
        """
        tensors = self._roster.tensors
        check_form(f"client {client!r}: the reply", difference, self._roster.manifests[client].tensors, tensors)
        clipped, norm = clip(difference, self._privacy.budget.clip_norm)
        self._averaging.add(client, clipped, dict.fromkeys(self._held[client], 1))
        self._norms[client] = norm

    def finish(self) -> dict[str, Tensor]:
        """The server's new values (float32), with noise. What is released goes into the ledger."""
        privacy, budget, roster = self._privacy, self._privacy.budget, self._roster
        released = {name: count for name, count in self._holders.items() if count >= budget.holders_needed}
        rest = {name: count for name, count in self._holders.items() if name not in released}
        withheld = _fewest(rest, roster)
        values = sum(tensor.numel() for tensor in roster.tensors.values())
        longest = sensitivity(budget.clip_norm, max(self._holders.values(), default=0), values)
        noise, means = budget.noise_multiplier * longest, self._averaging.means(self._holders)
        tensors = release(roster.tensors, means, released, noise, privacy.random_bytes)
        privacy.ledger.take(self._held, {roster.component_of[name] for name in released})
        if withheld:
            log.warning("%d components keep their values: %s", len(withheld), _few(withheld, budget.holders_needed))
        self._tell("privacy_round", norms=self._norms, withheld=withheld, holders_needed=budget.holders_needed)
        return tensors


def _holders(roster: Roster, names: Iterable[str]) -> dict[str, int]:
    """Tensor -> how many of some clients hold it, for those that any of them holds."""
    return dict(sorted(Counter(tensor for name in names for tensor in roster.manifests[name].tensors).items()))


def _fewest(holders: Mapping[str, int], roster: Roster) -> dict[str, int]:
    """Component -> the fewest holders that one of its tensors has, given tensor -> holders."""
    found: dict[str, int] = {}
    for name, count in holders.items():
        component = roster.component_of[name]
        found[component] = min(count, found.get(component, count))
    return dict(sorted(found.items()))


def _few(withheld: Mapping[str, int], needed: int) -> str:
    """Some components by name, with the holders that they have and those that they need."""
    shown = [f"{component!r} has {count} of {needed} clients" for component, count in list(withheld.items())[:3]]
    return ", ".join(shown) + (f" and {len(withheld) - 3} more (see metrics.jsonl)" if len(withheld) > 3 else "")
