import math

import pytest
import torch
from torch import nn

from tap_flower.core.components import ComponentMap, Pair
from tap_flower.core.replacement import decide, replace

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
