"""The encodings of tensors: errors within their bounds, sizes, and arrays that are not what they say."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tap_flower.config import Encoding
from tap_flower.errors import MessageError
from tap_flower.wire import tensors as encodings
from tap_flower.wire.tensors import SHARED, from_array, make_update, moved_from, moved_to, to_array

LOSSY = [Encoding.bfloat16, Encoding.int8]
State = dict[str, Tensor]


def rounded(tensor: Tensor, encoding: Encoding) -> Tensor:
    """What the receiver gets."""
    return from_array(to_array(tensor, encoding), encoding)


shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 300)),
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
    st.tuples(*[st.integers(0, 6)] * 4),
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Normal values of any size from 1e-40 to 1e30, with zeros and equal values among them."""
    shape, random = draw(shapes), torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(shape, generator=random) * 10.0 ** draw(st.integers(-40, 30))
    keep = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return values * (torch.rand(shape, generator=random) < keep)


@pytest.mark.parametrize("encoding", Encoding)
@given(tensor=tensors())
def test_shape_and_values_come_back(encoding: Encoding, tensor: Tensor) -> None:
    array = to_array(tensor, encoding)
    found = from_array(array, encoding)
    assert (found.shape, found.dtype) == (tensor.shape, torch.float32)
    assert array.data == to_array(tensor.clone(), encoding).data
    assert torch.equal(found, rounded(tensor, encoding))
    if encoding is Encoding.float32:
        assert torch.equal(found, tensor)
        return
    error, exact = (found.double() - tensor.double()).abs(), tensor.double().abs()
    if encoding is Encoding.bfloat16:  # 7 bits after the point: half of the last is 2^-8 of the power of two below
        assert bool((error <= exact * 2.0**-8 + 1e-40).all())
        assert len(array.data) == 2 * tensor.numel()
    else:
        bound = float(exact.max()) / 254 * 1.0001 if tensor.numel() else 0.0
        assert bool((error <= bound + 127 * 1.2e-38).all())
        assert len(array.data) <= tensor.numel() * (1 + 4 / SHARED) + 4


@given(st.integers(1, 20), st.integers(1, 400), st.integers(0, 2**31))
def test_a_row_has_a_scale_of_its_own_and_short_rows_are_joined(rows: int, length: int, seed: int) -> None:
    """Each row is ten times the one before: a shared scale of the whole tensor would leave nothing of the first ones."""
    tensor = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))
    tensor *= 10.0 ** torch.arange(rows)[:, None]
    array, joined = to_array(tensor, Encoding.int8), math.ceil(SHARED / length)
    assert len(array.data) == tensor.numel() + 4 * math.ceil(rows / joined)
    error = (from_array(array, Encoding.int8) - tensor).abs()
    for start in range(0, rows, joined):
        group = slice(start, start + joined)
        assert error[group].max() <= tensor[group].abs().max() / 254 * 1.0001


def test_int8_by_hand() -> None:
    row = torch.zeros(2, SHARED)
    row[0, :5] = torch.tensor([127.0, -127.0, 1.4, -1.6, 0.5])
    found = rounded(row, Encoding.int8)
    assert found[0, :5].tolist() == [127.0, -127.0, 1.0, -2.0, 0.0]  # ties go to the even number
    assert not found[1].any()
    scales = struct.unpack("<2f", to_array(row, Encoding.int8).data[:8])
    assert scales == (1.0, 0.0)


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_not_finite_is_not_encoded(encoding: Encoding, value: float) -> None:
    tensor = torch.zeros(3, 200)
    tensor[1, 7] = value
    with pytest.raises(MessageError, match=r"holds (nan|inf|3e\+38), which cannot be sent: lower the learning rate"):
        to_array(tensor, encoding)


NPY: dict[str, Any] = {k: getattr(Array(np.zeros(3, np.float32)), k) for k in ("dtype", "shape", "stype", "data")}
INT8 = ("int8", (2, 200), "tap-flower.int8", struct.pack("<2f", 1.0, 1.0) + bytes(400))


@pytest.mark.parametrize(
    ("encoding", "change", "problem"),
    [
        (Encoding.int8, {"data": INT8[3][:-1]}, r"has 407 bytes, not the 408 of \(2, 200\) in int8"),
        (Encoding.int8, {"data": b""}, "has 0 bytes, not the 408"),
        (Encoding.int8, {"shape": (2, 201)}, "has 408 bytes, not the 410"),
        (Encoding.int8, {"shape": (2**40, 2**40)}, "impossible shape"),
        (Encoding.int8, {"shape": (-2, -200)}, "impossible shape"),
        (Encoding.int8, {"shape": (0, *[2**31] * 4), "data": b""}, "impossible shape"),
        (Encoding.int8, {"data": struct.pack("<2f", 1.0, math.nan) + bytes(400)}, "not finite: a scale"),
        (Encoding.int8, {"data": struct.pack("<2f", math.inf, 1.0) + bytes(400)}, "not finite: a scale"),
        (Encoding.int8, {"stype": "cloudpickle"}, "is int8 in cloudpickle, not int8 in tap-flower.int8"),
        (Encoding.int8, {"dtype": "float64"}, "is float64 in tap-flower.int8, not int8"),
        (Encoding.bfloat16, {}, "is int8 in tap-flower.int8, not bfloat16 in tap-flower.bfloat16"),
        (Encoding.bfloat16, {"dtype": "bfloat16", "stype": "tap-flower.bfloat16"}, "has 408 bytes, not the 800"),
        (Encoding.float32, {}, "is int8 in tap-flower.int8, not float32 in numpy.ndarray"),
        (Encoding.float32, {"dtype": "float32", "stype": "numpy.ndarray"}, "cannot be read"),
        (Encoding.float32, NPY | {"data": b"PK\x03\x04" + bytes(60)}, "cannot be read"),
        (
            Encoding.float32,
            NPY | {"data": Array(np.zeros(2, np.float32)).data},
            r"has shape \(2,\) in its data, not \(3,\)",
        ),
        (Encoding.float32, NPY | {"data": NPY["data"].replace(b"(3,)", b"(((,")}, "cannot be read"),
        (Encoding.float32, NPY | {"data": NPY["data"][:-1]}, r"has 11 bytes of values, not the 12 of \(3,\)"),
        (Encoding.float32, NPY | {"data": NPY["data"] + b"x"}, "has 13 bytes of values, not the 12"),
        (Encoding.float32, NPY | {"shape": (2**20, 2**20)}, "impossible shape"),
        (Encoding.float32, NPY | {"shape": (1,) * 9}, "impossible shape"),
    ],
)
def test_an_array_that_is_not_what_it_says_is_refused(
    encoding: Encoding, change: dict[str, object], problem: str
) -> None:
    fields = dict(zip(("dtype", "shape", "stype", "data"), INT8, strict=True)) | change
    with pytest.raises(MessageError, match=problem):
        from_array(Array(**fields), encoding)  # type: ignore[call-overload]


def test_a_float32_array_that_holds_something_else_is_refused() -> None:
    array = Array(np.zeros(3))
    array.dtype = "float32"
    with pytest.raises(MessageError, match="is float64, not float32"):
        from_array(array, Encoding.float32)


@given(st.binary(max_size=64), st.lists(st.integers(-2, 2**31), max_size=5), st.sampled_from(Encoding))
def test_whatever_comes_it_is_a_tensor_or_refused(data: bytes, shape: list[int], encoding: Encoding) -> None:
    like = to_array(torch.zeros(1), encoding)
    try:
        found = from_array(Array(like.dtype, tuple(shape), like.stype, data), encoding)
    except MessageError:
        return
    assert found.dtype == torch.float32


def test_an_array_in_columns_is_read() -> None:
    values = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert from_array(Array(values), Encoding.float32).tolist() == values.tolist()


def test_a_header_is_parsed_once_and_a_bad_one_refused_each_time() -> None:
    encodings._header.cache_clear()
    arrays = [to_array(torch.full((3, 2), float(number)), Encoding.float32) for number in range(4)]
    assert [float(from_array(array, Encoding.float32).sum()) for array in arrays] == [0, 6, 12, 18]
    assert encodings._header.cache_info().misses == 1
    broken = arrays[0]
    broken.data = b"\x93NUMPX" + broken.data[6:]
    for _ in range(2):
        with pytest.raises(MessageError, match="cannot be read: the magic string is not correct"):
            from_array(broken, Encoding.float32)


def state(seed: int, size: float = 1.0) -> State:
    random = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 200), "b": (5,), "c": (2, 2, 2)}
    return {name: torch.randn(shape, generator=random) * size for name, shape in shapes.items()}


@pytest.mark.parametrize("encoding", LOSSY)
@given(seed=st.integers(0, 2**31), rounds=st.integers(1, 12))
def test_what_arrives_adds_up_to_what_was_trained(encoding: Encoding, seed: int, rounds: int) -> None:
    """After any number of rounds the server's sum lags behind the true one by the last residual, and by no more."""
    received, residual = state(seed), dict[str, Tensor]()
    true = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in received.items()}
    arrived = dict(true)
    for number in range(rounds):
        step = state(seed + number + 1, 0.01)
        trained = {name: value + step[name] for name, value in received.items()}
        difference, residual = make_update(received, trained, residual, encoding)
        for name in true:
            true[name] = true[name] + (trained[name] - received[name]).double()
            arrived[name] = arrived[name] + rounded(difference[name], encoding).double()
    for name, value in true.items():
        gap = value - arrived[name]
        torch.testing.assert_close(gap, residual[name].double(), atol=1e-7, rtol=0)
        assert gap.abs().max() <= 0.06 / 127  # half a step of the largest difference: 5 sigma and a residual


def test_without_feedback_small_steps_would_be_lost() -> None:
    """One value moves by 1, another by 1/300 of it: less than half a step of 1/127. After 300 rounds it has arrived."""
    received, sums = {"a": torch.zeros(1, 200)}, torch.zeros(1, 200)
    trained, residual = {"a": torch.zeros(1, 200)}, State()
    trained["a"][0, :2] = torch.tensor([1.0, 1 / 300])
    for _ in range(300):
        difference, residual = make_update(received, trained, residual, Encoding.int8)
        sums = sums + rounded(difference["a"], Encoding.int8)
    assert rounded(trained["a"], Encoding.int8)[0, 1] == 0.0
    torch.testing.assert_close(sums[0, :2], torch.tensor([300.0, 1.0]), atol=0.005, rtol=0)


def test_in_float32_a_difference_is_sent_as_it_is_and_nothing_is_kept() -> None:
    received, trained = state(1), state(2)
    difference, residual = make_update(received, trained, {}, Encoding.float32)
    assert all(torch.equal(difference[name], value - received[name]) for name, value in trained.items())
    assert residual == {}


def test_a_value_that_is_not_finite_is_named() -> None:
    received = state(1)
    trained = {**received, "b": received["b"] * float("nan")}
    with pytest.raises(MessageError, match="tensor 'b' holds nan, which cannot be sent"):
        make_update(received, trained, {}, Encoding.int8)


def test_the_servers_values_travel_as_they_are_or_as_differences_to_the_first_ones() -> None:
    values, first = {"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([1.0, 1.0])}
    assert moved_from(values, first, Encoding.float32)["a"].tolist() == [3.0, 4.0]
    assert moved_to(values, {}, Encoding.float32)["a"].tolist() == [3.0, 4.0]
    sent = moved_from(values, first, Encoding.bfloat16)
    assert sent["a"].tolist() == [2.0, 3.0]
    assert moved_to(sent, first, Encoding.bfloat16)["a"].tolist() == [3.0, 4.0]


def test_what_fits_no_first_value_is_left_to_the_check_that_names_it() -> None:
    first = {"a": torch.tensor([1.0, 2.0])}
    found = moved_to({"new": torch.ones(1), "a": torch.ones(1)}, first, Encoding.int8)
    assert found["new"].tolist() == [1.0]
    assert found["a"].shape == (1,)  # not broadcast
