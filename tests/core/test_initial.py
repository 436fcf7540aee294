import math

import pytest
import torch
from torch import nn

from tap_flower.core.initial import LARGEST_SCALE, Distribution, Initial, initial_values
from tap_flower.core.seeds import named_seed


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
    with pytest.raises(ValueError, match=r"unknown distribution 'cauchy': use one of \('constant', 'identity',"):
        Initial("cauchy", 1.0)  # type: ignore[arg-type]


def test_an_identity_multiplies_by_its_scale() -> None:
    linear, convolution = (
        Initial("identity", 3.0).value("x", (2, 3), 0),
        Initial("identity", 2.0).value("x", (2, 2, 3), 0),
    )
    assert linear.tolist() == [[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]]
    assert convolution.tolist() == [[[0.0, 2.0, 0.0], [0.0] * 3], [[0.0] * 3, [0.0, 2.0, 0.0]]]
    for size in (2, 3, 4, 5):
        Initial("identity", 1.0).check((1,) * size)
    for shape in ((3,), (1,) * 6):
        with pytest.raises(ValueError, match=rf"an identity has 2 to 5 dimensions, not those of \({shape[0]},"):
            Initial("identity", 1.0).check(shape)
        Initial("normal", 1.0).check(shape)


def test_normal_and_uniform_values_are_those_of_a_generator_with_the_named_seed() -> None:
    generator = torch.Generator().manual_seed(named_seed(7, "a.b"))
    normal = Initial("normal", 2.0).value("a.b", (3, 2), 7)
    assert torch.equal(normal, torch.empty(3, 2).normal_(0.0, 2.0, generator=generator))
    assert (normal.dtype, normal.device.type) == (torch.float32, "cpu")
    generator.manual_seed(named_seed(7, "a.b"))
    uniform = Initial("uniform", 0.5).value("a.b", (3, 2), 7)
    assert torch.equal(uniform, torch.empty(3, 2).uniform_(-0.5, 0.5, generator=generator))
    assert Initial("normal", 50.0).value("x", (10_000,), 0).mean().item() == pytest.approx(0.0, abs=2.0)


@pytest.mark.parametrize("distribution", ["constant", "identity", "normal", "uniform"])
def test_values_are_float32_whatever_the_default_is(distribution: Distribution) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert Initial(distribution, 1.0).value("x", (2, 2), 0).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("distribution", "scale", "problem"),
    [
        ("constant", 256.0, "^the scale is 256.0: values from 256 on are refused"),
        ("identity", -256.0, "^the scale is -256.0: values from 256 on are refused"),
        ("normal", math.nan, "^the scale is nan: values from 256 on are refused"),
        ("normal", -1.0, "^the scale of distribution 'normal' is -1.0: it is never negative"),
        ("uniform", -1e-9, "^the scale of distribution 'uniform' is -1e-09: it is never negative"),
    ],
)
def test_scales_that_are_refused(distribution: str, scale: float, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Initial(distribution, scale)  # type: ignore[arg-type]


def test_scales_that_are_not() -> None:
    assert LARGEST_SCALE == 256.0
    assert [Initial(d, 255.9).scale for d in ("constant", "identity", "normal", "uniform")] == [255.9] * 4
    assert (Initial("constant", -255.9).scale, Initial("identity", -1.0).scale) == (-255.9, -1.0)
    assert (Initial("normal", 0.0).scale, Initial("uniform", 0.0).scale) == (0.0, 0.0)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(2)), nn.Linear(4, 2)


class Said(Own):
    INITIALS = {"scale": Initial("constant", 3.0), "layer.bias": Initial("constant", 0.0)}  # noqa: RUF012


def test_how_parameters_start_follows_from_the_modules_that_own_them() -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 5), nn.ConvTranspose2d(2, 3, 5), nn.LayerNorm(3), nn.Linear(4, 1))
    found = initial_values(nn.ModuleDict({"net": net}))
    assert found["net.0.weight"] == found["net.0.bias"] == Initial("uniform", 1 / 10**0.5)  # 2 channels, 5 wide
    assert found["net.1.weight"] == found["net.1.bias"] == Initial("uniform", 1 / 75**0.5)  # 3 channels, 5 by 5
    assert (found["net.2.weight"], found["net.2.bias"]) == (Initial("constant", 1.0), Initial("constant", 0.0))
    assert found["net.3.weight"] == found["net.3.bias"] == Initial("uniform", 0.5)


def test_what_is_said_of_a_part_goes_before_its_type() -> None:
    net = nn.ModuleDict({"own": Own(), "layer": nn.Linear(4, 2), "said": Said()})
    asked: list[tuple[str, str]] = []

    def special(part: nn.Module, name: str) -> Initial | None:
        asked.append((type(part).__name__, name))
        return Initial("constant", 5.0) if name in ("scale", "bias") else None

    assert initial_values(net, special) == {
        "own.scale": Initial("constant", 5.0),
        "own.layer.weight": Initial("uniform", 0.5),
        "own.layer.bias": Initial("constant", 5.0),
        "layer.weight": Initial("uniform", 0.5),
        "layer.bias": Initial("constant", 5.0),
        "said.scale": Initial("constant", 3.0),
        "said.layer.weight": Initial("uniform", 0.5),
        "said.layer.bias": Initial("constant", 0.0),
    }
    assert set(asked) == {("Own", "scale"), ("Linear", "weight"), ("Linear", "bias")}


def test_what_is_said_of_one_tensor_says_nothing_of_the_next() -> None:
    class Two(Said):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(2))

    five = Initial("constant", 5.0)
    found = initial_values(Two(), lambda _, name: five if name == "shift" else None)
    assert (found["scale"], found["shift"]) == (Initial("constant", 3.0), five)


def test_what_an_outer_module_says_goes_before_what_its_part_says() -> None:
    class Outer(nn.Module):
        INITIALS = {"inner.scale": Initial("constant", 7.0)}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.inner = Said()

    assert initial_values(Outer())["inner.scale"] == Initial("constant", 7.0)
    assert initial_values(Outer())["inner.layer.bias"] == Initial("constant", 0.0)


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
