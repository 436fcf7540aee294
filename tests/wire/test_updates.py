"""What a client returns: differences with error feedback, and components that did not change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tap_flower.wire.updates import make_update, moved, restore
from torch import Tensor

from tap_flower.config import Encoding
from tap_flower.wire.tensors import MessageError, rounded

COMPONENTS = {"a": "one", "b": "one", "c": "two"}
State = dict[str, Tensor]


def state(seed: int, size: float = 1.0) -> State:
    random = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 200), "b": (5,), "c": (2, 2, 2)}
    return {name: torch.randn(shape, generator=random) * size for name, shape in shapes.items()}


def plus(left: State, right: State) -> State:
    return {name: value + right[name] for name, value in left.items()}


@pytest.mark.parametrize("encoding", [Encoding.bfloat16, Encoding.int8])
@given(seed=st.integers(0, 2**31), rounds=st.integers(1, 12))
def test_what_arrives_adds_up_to_what_was_trained(encoding: Encoding, seed: int, rounds: int) -> None:
    """After any number of rounds the server's sum lags behind the true one by the last residual, and by no more."""
    received, residual = state(seed), dict[str, Tensor]()
    true = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in received.items()}
    arrived = dict(true)
    for number in range(rounds):
        trained = plus(received, state(seed + number + 1, 0.01))
        update = make_update(received, trained, residual, COMPONENTS, encoding)
        residual = update.residual
        for name in true:
            true[name] = true[name] + (trained[name] - received[name]).double()
            arrived[name] = arrived[name] + rounded(update.tensors[name], encoding).double()
    for name, value in true.items():
        gap = value - arrived[name]
        torch.testing.assert_close(gap, residual[name].double(), atol=1e-7, rtol=0)
        assert gap.abs().max() <= 0.06 / 127  # half a step of the largest difference: 5 sigma and a residual


def test_without_feedback_small_steps_would_be_lost() -> None:
    """One value moves by 1, another by 1/300 of it: less than half a step of 1/127. After 300 rounds it has arrived."""
    received, sums = {"a": torch.zeros(1, 200)}, torch.zeros(1, 200)
    trained, residual = {"a": torch.zeros(1, 200)}, {}
    trained["a"][0, :2] = torch.tensor([1.0, 1 / 300])
    for _ in range(300):
        update = make_update(received, trained, residual, COMPONENTS, Encoding.int8)
        residual, sums = update.residual, sums + rounded(update.tensors["a"], Encoding.int8)
    assert rounded(trained["a"], Encoding.int8)[0, 1] == 0.0
    torch.testing.assert_close(sums[0, :2], torch.tensor([300.0, 1.0]), atol=0.005, rtol=0)


@pytest.mark.parametrize("encoding", Encoding)
def test_unchanged_components_are_not_sent_and_keep_their_residual(encoding: Encoding) -> None:
    received = state(1)
    trained = {**received, "b": received["b"] + 0.5}
    before = {"c": torch.full((2, 2, 2), 0.25)} if encoding is not Encoding.float32 else {}
    update = make_update(received, trained, before, COMPONENTS, encoding)
    assert update.unchanged == {"two"}
    assert update.tensors.keys() == {"a", "b"}  # a did not move either, but its component did
    assert all(torch.equal(update.residual[name], value) for name, value in before.items())
    assert update.residual.keys() == (set() if encoding is Encoding.float32 else {"a", "b", "c"})


def test_float32_is_sent_as_it_is() -> None:
    received, trained = state(1), state(2)
    update = make_update(received, trained, {}, COMPONENTS, Encoding.float32)
    assert all(torch.equal(update.tensors[name], value) for name, value in trained.items())
    back = restore(update.tensors, received, Encoding.float32)
    assert all(torch.equal(back[name], value) for name, value in trained.items())


def test_a_value_that_is_not_finite_is_named() -> None:
    received = state(1)
    trained = {**received, "b": received["b"] * float("nan")}
    with pytest.raises(MessageError, match="tensor 'b' holds nan, which cannot be sent"):
        make_update(received, trained, {}, COMPONENTS, Encoding.int8)


def test_the_server_adds_to_its_own_value_what_fits_it() -> None:
    current = {"a": torch.tensor([1.0, 2.0])}
    sent = {"a": torch.tensor([0.5, -0.5]), "new": torch.ones(1)}
    found = restore(sent, current, Encoding.int8)
    assert found["a"].tolist() == [1.5, 1.5]
    assert found["new"].tolist() == [1.0]
    # what would be broadcast is left as it is, for the aggregation's check to name
    assert restore({"a": torch.ones(1)}, current, Encoding.int8)["a"].shape == (1,)


def test_values_come_back_from_their_differences() -> None:
    values, start = {"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([1.0, 1.0])}
    sent = moved(values, start, Encoding.bfloat16)
    assert sent["a"].tolist() == [2.0, 3.0]
    assert restore(sent, start, Encoding.bfloat16)["a"].tolist() == [3.0, 4.0]
