"""The order of batches, and the data loader that reads them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tap_flower.core.training import Batch
from tap_flower.data.batching import ClientData, TrainingSampler
from tap_flower.data.examples import OWN, Examples, moved_to, own_examples, set_aside

CPU = torch.device("cpu")


def named(task: str, name: str, count: int, step: int | None, batch_size: int | None = None) -> Examples:
    """Examples that are a letter and a number; their lengths are 1 to 11, in steps."""
    lengths = None if step is None else np.array([step * i % 11 + 1 for i in range(count)])
    rows = [f"{name}{i}" for i in range(count)]
    return Examples(task, rows, range(count), " ".join, lambda read: ({"rows": read}, None), batch_size, lengths)  # type: ignore[arg-type, return-value]


def client(workers: int = 0) -> ClientData:
    """Two tasks with two sources each; one source is smaller than a batch, and one has no lengths."""
    b = [named("b", "b", 9, 4), named("b", "c", 5, 7)]
    a = [named("a", "a", 50, 3, batch_size=2), named("a", "d", 3, None)]
    return ClientData({"train": {"b": b, "a": a}}, workers)


def rows(batches: Iterable[Batch], count: int | None = None) -> list[str]:
    return [batch.inputs["rows"] for batch in itertools.islice(batches, count)]


# What `training_batches` and `batches` gave before there was a sampler: every published result has this order.
SHUFFLED = [
    "a19 a2", "b4 b5 b6 b3", "a22 a43", "b8 b7 b2 b0", "a8 a13", "c2 c1 c0 c4", "a42 a48", "b6 b8 b4 b2",
    "a38 a46", "b7 b0 b1 b5", "a26 a23", "c0 c2 c3 c1", "a17 a12", "b6 b1 b4 b3", "a14 a24", "c1 c0 c2 c4",
    "a28 a3", "b0 b8 b5 b7", "a11 a34", "b1 b4 b3 b5", "a21 a40", "c0 c1 c2 c3", "a1 a18", "b8 b2 b0 b7",
]  # fmt: skip
BY_LENGTH = [
    "a33 a11", "b4 b6 b3 b0", "a0 a22", "b8 b5 b2 b7", "a20 a27", "c1 c4 c2 c0", "a42 a49", "b8 b5 b2 b7",
    "a5 a16", "b4 b1 b6 b0", "a34 a45", "c3 c1 c2 c0", "a36 a14", "b1 b6 b3 b0", "a23 a1", "c1 c4 c2 c0",
    "a3 a25", "b8 b5 b7 b4", "a19 a15", "b4 b1 b3 b0", "a38 a12", "c3 c1 c2 c0", "a41 a8", "b8 b5 b2 b7",
]  # fmt: skip
ONCE = [
    "b8 b5 b2 b7", "b4 b1 b6 b3", "b0", "c3 c1 c4 c2", "c0", "a7 a18 a29 a40", "a3 a14 a25 a36", "a47 a10 a21 a32",
    "a43 a6 a17 a28", "a39 a2 a13 a24", "a35 a46 a9 a20", "a31 a42 a5 a16", "a27 a38 a49 a1", "a12 a23 a34 a45",
    "a8 a19 a30 a41", "a4 a15 a26 a37", "a48 a0 a11 a22", "a33 a44", "d0 d1 d2",
]  # fmt: skip


@pytest.mark.parametrize(("group_by_length", "expected"), [(False, SHUFFLED), (True, BY_LENGTH)])
def test_the_order_of_training_batches_is_frozen(group_by_length: bool, expected: list[str]) -> None:
    assert rows(client().training_batches(4, 41, CPU, group_by_length), len(expected)) == expected


def test_the_order_of_evaluation_is_frozen() -> None:
    assert rows(client().batches("train", 4, CPU)) == ONCE


def test_what_is_set_aside_is_frozen() -> None:
    rest, aside = set_aside(client().splits["train"]["b"][0], 5)
    assert ([*rest], [*aside]) == (["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7"], ["b8"])
    assert aside.lengths is not None
    assert aside.lengths.tolist() == [4 * 8 % 11 + 1]
    assert rest.batch([1, 0], CPU).inputs["rows"] == "b1 b0"


def test_a_sampler_gives_the_same_batches_each_time() -> None:
    sampler = TrainingSampler([named("a", "a", 9, None)], 4, 3)
    one, other = list(itertools.islice(sampler, 5)), list(itertools.islice(sampler, 5))
    assert one == other


def test_two_workers_give_what_none_gives() -> None:
    data, alone = client(workers=2), client()
    for seed in (41, 42):  # the workers of the first pass go on with the second
        expected = rows(alone.training_batches(4, seed, CPU, True), 30)
        assert rows(data.training_batches(4, seed, CPU, True), 30) == expected
    for _ in range(2):
        assert rows(data.batches("train", 4, CPU)) == ONCE


def test_with_workers_a_pass_ends_when_another_begins() -> None:
    data = client(workers=1)
    first = data.training_batches(4, 41, CPU)
    next(first)
    assert next(data.training_batches(4, 41, CPU)).inputs["rows"] == SHUFFLED[0]
    with pytest.raises(RuntimeError, match="a second pass over the train examples has begun"):
        next(first)


def test_without_workers_passes_go_on_side_by_side() -> None:
    data = client()
    one, other = data.training_batches(4, 41, CPU), data.training_batches(4, 41, CPU)
    found = [batch.inputs["rows"] for pair in itertools.islice(zip(one, other, strict=True), 24) for batch in pair]
    assert (found[::2], found[1::2]) == (SHUFFLED, SHUFFLED)


def test_drawing_batches_draws_no_random_number_of_the_process() -> None:
    """Else dropout would depend on how data are loaded."""
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    rows(client().training_batches(4, 41, CPU), 9)
    rows(client().batches("train", 4, CPU))
    assert torch.equal(torch.rand(3), expected)


class Squares(Dataset[tuple[Tensor, int]]):
    """A user's data set; `reads` are the batches that were read at once."""

    def __init__(self) -> None:
        self.reads: list[list[int]] = []

    def __len__(self) -> int:
        return 5

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.tensor([float(row)]), row * row

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, int]]:
        self.reads.append(rows)
        return [self[row] for row in rows]


def test_a_users_data_set_is_read_a_batch_at_a_time() -> None:
    squares = Squares()
    examples = own_examples("t", squares, lambda own: own[1], None)
    assert examples.batch_size is None
    batch = examples.subset([4, 2, 0]).batch([2, 0], CPU)
    assert squares.reads == [[0, 4]]
    assert batch.inputs[OWN][0].tolist() == [[0.0], [4.0]]
    assert batch.target.tolist() == [0, 16]
    assert examples.by_length([3, 1]) == [3, 1]


def test_a_users_data_loader_gives_data_set_collate_function_batch_size_and_pinning() -> None:
    def summed(items: list[tuple[Tensor, int]]) -> Tensor:
        return torch.stack([x for x, _ in items]).sum()

    loader = DataLoader(Squares(), batch_size=3, collate_fn=summed, pin_memory=True)
    examples = own_examples("t", loader, lambda own: own, None)
    assert (examples.batch_size, examples.pinned, len(examples)) == (3, True, 5)
    assert own_examples("t", loader, lambda own: own, 2).batch_size == 2
    assert examples.batch([4, 1], CPU).target == 5.0


def test_a_data_set_without_an_index_is_refused() -> None:
    with pytest.raises(TypeError, match="task 't' has a generator without a length or an index: give a data set"):
        own_examples("t", (x for x in ()), lambda own: own, None)  # type: ignore[arg-type]


def test_batches_of_any_form_are_moved() -> None:
    class Moved:
        def to(self, device: torch.device) -> Any:
            return device.type

    found = moved_to({"x": [torch.zeros(1), (Moved(), "text")], "y": torch.return_types.max((torch.ones(1),) * 2)}, CPU)
    assert found["x"][1] == ("cpu", "text")
    assert found["x"][0].device == CPU
