import math

import pytest
import torch
from torch import nn

from tap_flower.core.initial import Initial, initial_values, named_seed


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


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(2)), nn.Linear(4, 2)


class Said(Own):
    INITIALS = {"scale": Initial("constant", 3.0), "layer.bias": Initial("constant", 0.0)}  # noqa: RUF012


def test_how_parameters_start_follows_from_the_modules_that_own_them() -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 5), nn.GroupNorm(1, 3), nn.Embedding(4, 3), nn.GRU(3, 16), nn.PReLU())
    found = initial_values(nn.ModuleDict({"net": net, "attention": nn.MultiheadAttention(8, 2)}))
    assert found["net.0.weight"] == found["net.0.bias"] == Initial("uniform", 1 / 10**0.5)  # 2 channels, 5 wide
    assert (found["net.1.weight"], found["net.1.bias"]) == (Initial("constant", 1.0), Initial("constant", 0.0))
    assert found["net.2.weight"] == Initial("normal", 1.0)
    assert found["net.3.weight_hh_l0"] == found["net.3.bias_ih_l0"] == Initial("uniform", 0.25)
    assert found["net.4.weight"] == Initial("constant", 0.25)
    assert found["attention.in_proj_weight"] == Initial("uniform", (6 / (24 + 8)) ** 0.5)
    assert found["attention.in_proj_bias"] == Initial("constant", 0.0)


def test_a_module_states_how_its_own_parameters_start_or_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"no initial value is defined for Own.scale \(2,\): give class Own an INITIALS"
    ):
        initial_values(Own())
    assert initial_values(Said()) == {
        "scale": Initial("constant", 3.0),
        "layer.weight": Initial("uniform", 0.5),
        "layer.bias": Initial("constant", 0.0),
    }
