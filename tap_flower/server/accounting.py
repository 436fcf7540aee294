"""What differential privacy costs: the noise that keeps a run within its ε, and what has been spent of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tap_flower.config import Config
from tap_flower.core.privacy import holders_needed
from tap_flower.errors import ConfigError


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
        rounds: the largest number of rounds in which a client can take part.
        clip_norm: C.
        noise_multiplier: z, the smallest with ε(rounds) ≤ ε.
        holders_needed: holders that a component must have in a round to be released.
    """

    epsilon: float
    delta: float
    rounds: int
    clip_norm: float
    noise_multiplier: float
    holders_needed: int

    def spent(self, releases: int) -> float:
        """ε after a client took part in a number of releases."""
        return _epsilon(self.noise_multiplier, self.delta, releases)


def budget_of(config: Config) -> Budget | None:
    """The budget of a run; None where it has no differential privacy.

    Raises:
        ConfigError: the package is not installed, or no round can ever have enough clients.
    """
    wanted = config.privacy
    if wanted.epsilon is None:
        return None
    noise_multiplier = calibrate(wanted.epsilon, wanted.delta, config.rounds)
    needed = holders_needed(noise_multiplier, wanted.max_noise)
    most = min(config.clients_per_round, len(config.clients) or config.clients_per_round)
    if needed > most:
        raise ConfigError(
            f"privacy.epsilon = {wanted.epsilon:g} over rounds = {config.rounds} takes a noise multiplier of "
            f"{noise_multiplier:.3g}; privacy.max_noise = {wanted.max_noise:g} then needs {needed} clients that hold a "
            f"component in one round, and a round has {most} (clients_per_round = {config.clients_per_round}, "
            f"{len(config.clients)} clients in the configuration): nothing would ever be released. Have more clients in a "
            f"round, fewer rounds, a larger epsilon, or from privacy.max_noise = {noise_multiplier / most:.3g} on"
        )
    return Budget(wanted.epsilon, wanted.delta, config.rounds, wanted.clip_norm, noise_multiplier, needed)


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
            f"privacy.epsilon is set, and the package dp-accounting is not installed ({error}): "
            f"pip install 'tap-flower[privacy]'"
        ) from error
    return dp_accounting, RdpAccountant
