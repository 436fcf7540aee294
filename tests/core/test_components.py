import pytest
import torch
from torch import nn

from tap_flower.core.components import (
    ComponentMap,
    ComponentModel,
    Pair,
    cpu_state,
    load_trainable_state,
    trainable_state,
)
from tap_flower.core.initial import Initial

READ, SEE = Pair("read", ("text",)), Pair("see", ("image",))


def two_pairs() -> ComponentMap:
    return ComponentMap(
        {"text.w": "text", "image.w": "image", "shared.w": "shared", "shared.b": "shared"},
        {READ: frozenset({"text", "shared"}), SEE: frozenset({"image", "shared"})},
    )


def test_tensors_of_a_pair_are_those_of_its_components() -> None:
    assert two_pairs().tensors_of(READ) == ("text.w", "shared.w", "shared.b")
    assert two_pairs().tensors_of(SEE) == ("image.w", "shared.w", "shared.b")


def test_pairs_by_task_and_as_text() -> None:
    assert two_pairs().pair_of_task == {"read": READ, "see": SEE}
    assert str(Pair("answer", ("text", "image"))) == "image+text:answer"
    assert sorted([SEE, READ, Pair("read", ("image",))]) == [Pair("read", ("image",)), READ, SEE]


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


def test_a_state_on_the_cpu_is_a_copy_and_the_trainable_state_is_not() -> None:
    one = model()
    shared, copied = trainable_state(one), cpu_state(one)
    one.weight.data.fill_(5.0)
    assert copied.keys() == {"weight"}
    assert bool((shared["weight"] == 5.0).all())
    assert not bool((copied["weight"] == 5.0).any())
    assert not shared["weight"].requires_grad


def test_loading_copies_values() -> None:
    one, state = model(), {"weight": torch.full((3, 2), 7.0)}
    load_trainable_state(one, state)
    state["weight"].fill_(8.0)
    assert (one.weight == 7.0).all()
    assert one.weight.requires_grad
    assert one.weight.is_leaf


def test_only_the_named_tensors_are_loaded() -> None:
    one = nn.Linear(2, 3)
    bias, state = one.bias.clone(), {"weight": torch.full((3, 2), 7.0), "bias": torch.zeros(3), "more": torch.zeros(1)}
    load_trainable_state(one, state, ["weight"])
    assert (one.weight == 7.0).all()
    assert torch.equal(one.bias, bias)


class Started(ComponentModel):
    initials = {"weight": Initial("uniform", 0.5)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def test_a_model_starts_with_the_values_of_seed_and_name() -> None:
    first = Started().first_values(41)
    assert first.keys() == {"weight"}
    assert torch.equal(first["weight"], Initial("uniform", 0.5).value("weight", (2, 3), 41))


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
