import math

import pytest
import torch

from tap_flower.core.initial import Initial, named_seed


def test_a_value_depends_on_seed_and_name_alone() -> None:
    uniform = Initial("uniform", 0.5)
    value = uniform.value("a.b", (4, 5), seed=1)
    torch.manual_seed(99)
    assert torch.equal(value, uniform.value("a.b", (4, 5), seed=1))
    assert not torch.equal(value, uniform.value("a.c", (4, 5), seed=1))
    assert not torch.equal(value, uniform.value("a.b", (4, 5), seed=2))


def test_distributions() -> None:
    uniform = Initial("uniform", 0.5).value("x", (10_000,), 0)
    assert -0.5 <= uniform.min() < -0.49
    assert 0.49 < uniform.max() <= 0.5
    assert uniform.std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.03)
    assert Initial("normal", 2.0).value("x", (10_000,), 0).std().item() == pytest.approx(2.0, rel=0.03)
    assert Initial("constant", 3.0).value("x", (2,), 0).tolist() == [3.0, 3.0]
    with pytest.raises(ValueError, match="unknown distribution 'cauchy'"):
        Initial("cauchy", 1.0)  # type: ignore[arg-type]


def test_named_seeds_differ_and_fit() -> None:
    seeds = {named_seed(0, "a", i) for i in range(1000)} | {named_seed(1, "a", 0), named_seed(0, "b", 0)}
    assert len(seeds) == 1002
    assert all(0 <= seed < 2**63 for seed in seeds)
