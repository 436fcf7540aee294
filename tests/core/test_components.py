import pytest
import torch
from torch import nn

from tap_flower.core.components import ComponentMap, Pair, load_trainable_state, trainable_state

READ, SEE = Pair("read", ("text",)), Pair("see", ("image",))


def two_pairs() -> ComponentMap:
    return ComponentMap(
        {"text.w": "text", "image.w": "image", "shared.w": "shared", "shared.b": "shared"},
        {READ: frozenset({"text", "shared"}), SEE: frozenset({"image", "shared"})},
    )


def test_tensors_of_a_pair_are_those_of_its_components() -> None:
    assert two_pairs().tensors_of(READ) == ("text.w", "shared.w", "shared.b")
    assert two_pairs().tensors_of(SEE) == ("image.w", "shared.w", "shared.b")


def test_weights_count_the_examples_of_the_pairs_that_reach_a_component() -> None:
    assert two_pairs().examples_per_component({READ: 30, SEE: 12}) == {"text": 30, "image": 12, "shared": 42}


def test_what_no_pair_reaches_must_not_be_held() -> None:
    with pytest.raises(ValueError, match="no pair reaches.*'spare'"):
        ComponentMap({"a": "text", "b": "spare"}, {READ: frozenset({"text"})})
    with pytest.raises(ValueError, match="without tensors.*'image'"):
        ComponentMap({"a": "text"}, {READ: frozenset({"text", "image"})})


def test_pairs_do_not_depend_on_the_order_of_modalities() -> None:
    assert Pair("answer", ("text", "image")) == Pair("answer", ("image", "text"))
    with pytest.raises(ValueError, match="no modality"):
        Pair("answer", ())


def model() -> nn.Module:
    linear = nn.Linear(2, 3)
    linear.bias.requires_grad_(False)
    return linear


def test_frozen_tensors_are_not_in_the_trainable_state() -> None:
    assert trainable_state(model()).keys() == {"weight"}


def test_loading_copies_values() -> None:
    one = model()
    load_trainable_state(one, {"weight": torch.full((3, 2), 7.0)})
    assert (one.weight == 7.0).all()


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({}, "lacks 1"),
        ({"weight": torch.zeros(3, 2), "more": torch.zeros(1)}, "the model lacks.*more"),
        ({"weight": torch.zeros(2, 3)}, r"shape \(2, 3\) in the state, \(3, 2\) in the model"),
    ],
)
def test_loading_is_strict_and_changes_nothing_on_an_error(state: dict[str, torch.Tensor], problem: str) -> None:
    one = model()
    before = one.weight.clone()
    with pytest.raises(ValueError, match=problem):
        load_trainable_state(one, state)
    assert torch.equal(one.weight, before)


def test_loading_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable tensor named.*'bias'"):
        load_trainable_state(model(), {"bias": torch.zeros(3)}, ["bias"])
