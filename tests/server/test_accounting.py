"""What differential privacy costs."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
from scipy.optimize import brentq

from tap_flower.config import Config, load_config
from tap_flower.errors import ConfigError
from tap_flower.server.privacy import Budget, Ledger, budget_of, calibrate

pytest.importorskip("dp_accounting", reason='needs: pip install "tap-flower[privacy]"')


def exact_epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Of T Gaussian mechanisms, composed: δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) with μ = √T / z.

    Balle and Wang (2018), theorem 8; Dong, Roth and Su (2019), corollary 3.3.
    """
    mu = math.sqrt(rounds) / noise_multiplier

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    def excess(epsilon: float) -> float:
        return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu) - delta

    return float(brentq(excess, 0.0, 300.0)) if excess(0.0) > 0 else 0.0


def private(*settings: str) -> Config:
    return load_config("demo", "", ["privacy.epsilon=8", "privacy.max_noise=1000", *settings])


def budget(*settings: str) -> Budget:
    found = budget_of(private(*settings))
    assert found is not None
    return found


def test_the_exact_formula_itself() -> None:
    # z = 1, T = 1, ε = 1: δ = Φ(-.5) − e · Φ(-1.5) = .308538 − 2.718282 · .066807 = .126936
    assert exact_epsilon(1.0, 1, 0.12693674) == pytest.approx(1.0, abs=1e-5)
    assert exact_epsilon(2.0, 4, 0.12693674) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 100.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
@pytest.mark.parametrize("rounds", [1, 7, 200, 1_000_000])
def test_the_noise_is_enough_and_little_more(epsilon: float, delta: float, rounds: int) -> None:
    noise_multiplier = calibrate(epsilon, delta, rounds)
    spent = Budget(epsilon, delta, 1.0, noise_multiplier, 1).spent(rounds)
    assert spent <= epsilon
    assert spent == pytest.approx(epsilon, rel=1e-3)
    exact = exact_epsilon(noise_multiplier, rounds, delta)
    assert exact <= spent <= 1.12 * exact  # the Rényi accountant is an upper bound, 12 % above the truth at the most
    assert exact_epsilon(noise_multiplier / 1.12, rounds, delta) > epsilon  # so much less noise is not enough


def test_spending() -> None:
    found = budget("rounds=9")
    assert found.spent(0) == 0.0
    assert 0 < found.spent(1) < found.spent(3) < found.spent(9) <= 8.0
    assert found.spent(10) > 8.0
    for rounds in (1, 3, 9):
        exact = exact_epsilon(found.noise_multiplier, rounds, 1e-5)
        assert exact <= found.spent(rounds) <= 1.12 * exact


def test_no_epsilon_no_budget() -> None:
    assert budget_of(load_config("demo")) is None


def test_a_round_that_can_never_have_enough_clients_is_refused_with_what_would_do() -> None:
    with pytest.raises(
        ConfigError, match=r"needs 91 clients .* a round has 4 .*nothing would ever be released"
    ) as error:
        budget("rounds=200", "clients_per_round=4", "privacy.max_noise=0.1")
    # z = 9.018 (see the table of the page on privacy) over 4 clients
    assert "from privacy.max_noise = 2.25 on" in str(error.value)
    assert budget("rounds=200", "clients_per_round=4", "privacy.max_noise=2.26").holders_needed == 4
    with pytest.raises(ConfigError, match="a round has 12 "):  # the demo has twelve clients
        budget("rounds=200", "clients_per_round=100", "privacy.max_noise=0.5")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"dp-accounting is not installed.*pip install 'tap-flower\[privacy\]'"):
        calibrate(7.77, 1e-5, 3)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("stopping.patience=3", r"privacy.epsilon = 8 and stopping.patience = 3: .*set stopping.patience=0"),
        ("aggregation.clip_norm=2", r"aggregation.clip_norm = 2: .*leave aggregation.clip_norm null"),
        ("privacy.epsilon=0", r"privacy.epsilon = 0.* is out of bounds: choose between 0.1 and 100"),
        ("privacy.delta=0.5", "privacy.delta = 0.5 is out of bounds"),
        ("privacy.clip_norm=0", "privacy.clip_norm = 0.* is out of bounds"),
        ("privacy.max_noise=0", "privacy.max_noise = 0.* is out of bounds"),
    ],
)
def test_what_does_not_go_together_is_an_error(setting: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        private(setting)


def test_the_ledger_counts_what_was_released_to_whom_it_concerns() -> None:
    ledger = Ledger()
    ledger.take({"ann": {"x", "y"}, "bob": {"x"}, "cleo": {"z"}}, {"x"})
    ledger.take({"ann": {"x", "y"}, "cleo": {"z"}}, {"x", "y"})
    ledger.take({"bob": {"x"}, "cleo": {"z"}}, set())
    assert ledger.clients == {"ann": 2, "bob": 1, "cleo": 0}
    assert ledger.holders == {"x": {"ann": 2, "bob": 1}, "y": {"ann": 1}}
    assert ledger.rounds == {"x": 2, "y": 1}


def test_the_table_of_the_page_on_privacy() -> None:
    page = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
    header, _, *rows = page[page.index("| ε |") :].split("\n\n")[0].splitlines()
    rounds = [int(n) for n in re.findall(r"(\d+) rounds", header)]
    assert rounds == [4, 20, 50, 200]
    for row in rows:
        epsilon, *cells = row.strip("| ").split(" | ")
        for number, cell in zip(rounds, cells, strict=True):
            needed, multiplier = re.findall(r"[\d.]+", cell)
            found = calibrate(float(epsilon), 1e-5, number)
            assert (int(needed), float(multiplier)) == (math.ceil(found / 0.1), round(found, 2))


def test_the_command_of_the_page_on_privacy_has_enough_clients() -> None:
    page = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
    settings = [*re.findall(r"--set (\S+=\S+)", page), "rounds=4"]
    assert "--rounds 4" in page
    assert len(settings) == 5
    found = budget_of(load_config("demo", "", settings))
    assert found is not None
    assert found.holders_needed == 7
