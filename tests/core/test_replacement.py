import math

import pytest
import torch
from torch import nn

from tap_flower.core.components import ComponentMap, Pair
from tap_flower.core.replacement import Decision, decide, replace

READ, SEE = Pair("read", ("text",)), Pair("see", ("image",))


class Model(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.text, self.image, self.shared = (nn.Parameter(torch.full((2,), value)) for _ in range(3))


MAP = ComponentMap(
    {"text": "text", "image": "image", "shared": "shared"},
    {READ: frozenset({"text", "shared"}), SEE: frozenset({"image", "shared"})},
)


@pytest.mark.parametrize(
    ("teacher", "personal", "margin", "replaced"),
    [
        (1.0, 1.2, 0.1, True),
        (1.0, 1.1, 0.2, False),
        (1.0, 1.5, 0.5, False),  # equality is not better
        (1.0, math.inf, 5.0, True),
        (2.0, 1.0, 0.0, False),
        (1.0, math.nan, 0.1, True),  # a personal model that is broken
        (math.nan, 1.0, 0.0, False),  # a server's copy that is
        (-math.inf, 1.0, 0.0, False),
        (math.nan, math.nan, 0.0, False),
    ],
)
def test_the_server_must_be_better_by_more_than_the_margin(
    teacher: float, personal: float, margin: float, replaced: bool
) -> None:
    (decision,) = decide(MAP, {"read": teacher}, {"read": personal}, {"read": margin, "see": 0.0})
    assert decision.pair == READ
    assert decision.replaced is replaced


def test_before_the_first_participation_everything_is_replaced() -> None:
    decisions = decide(MAP, {"read": 9.0, "see": 9.0}, {}, {"read": 1.0, "see": 1.0})
    assert [d.replaced for d in decisions] == [True, True]


@pytest.mark.parametrize(
    ("replaced", "moved"),
    [
        (set(), set()),
        ({"read"}, {"text", "shared"}),
        ({"see"}, {"image", "shared"}),
        ({"read", "see"}, {"text", "image", "shared"}),
    ],
)
def test_exactly_the_tensors_that_the_pair_reaches_are_copied(replaced: set[str], moved: set[str]) -> None:
    personal, source = Model(1.0), {name: torch.full((2,), 2.0) for name in ("text", "image", "shared")}
    losses = {task: 0.0 if task in replaced else 5.0 for task in ("read", "see")}
    decisions = decide(MAP, losses, {"read": 1.0, "see": 1.0}, {"read": 0.1, "see": 0.1})
    assert replace(personal, source, MAP, decisions) == moved
    assert {name for name, value in personal.named_parameters() if value[0] == 2.0} == moved


class Normed(nn.Module):
    moving = frozenset({"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"})

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)


@pytest.mark.parametrize(("share", "mean", "batches"), [(1.0, 4.0, 7), (0.25, 1.0, 1)])
def test_buffers_that_training_changes_are_mixed_too(share: float, mean: float, batches: int) -> None:
    model = Normed()
    source = {name: torch.full_like(value, 4.0) for name, value in model.state_dict().items()}
    source["norm.num_batches_tracked"] = torch.tensor(7.0)  # as `cpu_state` gives it
    component_map = ComponentMap(dict.fromkeys(source, "norm"), {READ: frozenset({"norm"})})
    assert replace(model, source, component_map, [Decision(READ, 0.0, 1.0, 0.0, share)]) == set(source)
    assert model.norm.running_mean is not None
    assert model.norm.running_mean.tolist() == [mean, mean]  # of 0 and 4
    assert int(model.norm.num_batches_tracked or 0) == batches  # of 0 and 7, rounded down
