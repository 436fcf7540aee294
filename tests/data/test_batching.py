"""The order of batches, and the data loader that reads them."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from tap_flower.core.training import Batch
from tap_flower.data.batching import AHEAD, ClientData, read_ahead, training_order, turns
from tap_flower.data.examples import (
    OWN,
    Examples,
    OwnLoader,
    beginning,
    extremes,
    moved_to,
    own_examples,
    set_aside,
    split_off,
)

CPU = torch.device("cpu")


def named(
    task: str, name: str, count: int, step: int | None, batch_size: int | None = None, workers: int = 0
) -> Examples:
    """Examples that are a letter and a number; their lengths are 1 to 11, in steps."""
    lengths = None if step is None else np.array([step * i % 11 + 1 for i in range(count)])
    rows = [f"{name}{i}" for i in range(count)]
    return Examples(
        task,
        rows,
        range(count),
        " ".join,
        lambda read: ({"rows": read}, None),  # type: ignore[arg-type, return-value]
        batch_size,
        lengths,
        workers=workers,
    )


def client(workers: int = 0) -> ClientData:
    """Two tasks with two sources each; one source is smaller than a batch, and one has no lengths."""
    b = [named("b", "b", 9, 4, workers=workers), named("b", "c", 5, 7, workers=workers)]
    a = [named("a", "a", 50, 3, batch_size=2, workers=workers), named("a", "d", 3, None, workers=workers)]
    return ClientData({"train": {"b": b, "a": a}})


def rows(batches: Iterable[Batch], count: int | None = None) -> list[str]:
    return [batch.inputs["rows"] for batch in itertools.islice(batches, count)]


# Each task's batches are those that `training_batches` gave before there was a sampler; the turns are drawn.
SHUFFLED = [
    "a19 a2", "b4 b5 b6 b3", "b8 b7 b2 b0", "a22 a43", "a8 a13", "c2 c1 c0 c4", "b6 b8 b4 b2", "a42 a48",
    "b7 b0 b1 b5", "a38 a46", "a26 a23", "c0 c2 c3 c1", "b6 b1 b4 b3", "a17 a12", "c1 c0 c2 c4", "a14 a24",
    "b0 b8 b5 b7", "a28 a3", "b1 b4 b3 b5", "a11 a34", "a21 a40", "c0 c1 c2 c3", "a1 a18", "b8 b2 b0 b7",
]  # fmt: skip
BY_LENGTH = [
    "a33 a11", "b4 b6 b3 b0", "b8 b5 b2 b7", "a0 a22", "a20 a27", "c1 c4 c2 c0", "b8 b5 b2 b7", "a42 a49",
    "b4 b1 b6 b0", "a5 a16", "a34 a45", "c3 c1 c2 c0", "b1 b6 b3 b0", "a36 a14", "c1 c4 c2 c0", "a23 a1",
    "b8 b5 b7 b4", "a3 a25", "b4 b1 b3 b0", "a19 a15", "a38 a12", "c3 c1 c2 c0", "a41 a8", "b8 b5 b2 b7",
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


def test_a_seed_gives_the_same_batches_each_time() -> None:
    one, other = (list(itertools.islice(training_order([named("a", "a", 9, None)], 4, 3), 5)) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_give_what_none_gives(workers: int) -> None:
    data, alone = client(workers), client()
    for seed in (41, 42):
        expected = rows(alone.training_batches(4, seed, CPU, True), 30)
        assert rows(data.training_batches(4, seed, CPU, True), 30) == expected
    assert rows(data.batches("train", 4, CPU)) == ONCE


@pytest.mark.parametrize("workers", [0, 2])
def test_passes_go_on_side_by_side(workers: int) -> None:
    data = client(workers)
    one, other = data.training_batches(4, 41, CPU), data.training_batches(4, 41, CPU)
    found = [batch.inputs["rows"] for pair in itertools.islice(zip(one, other, strict=True), 24) for batch in pair]
    assert (found[::2], found[1::2]) == (SHUFFLED, SHUFFLED)


class Watched(Dataset[int]):
    """Rows that say which threads read them, and how many were read; the row `broken` cannot be."""

    def __init__(self, broken: int = -1) -> None:
        self.threads: set[str] = set()
        self.read, self.broken = 0, broken

    def __getitem__(self, row: int) -> int:
        self.threads.add(threading.current_thread().name)
        self.read += 1
        if row == self.broken:
            raise ValueError(f"row {row} is broken")
        return row


def watched(data: Watched, workers: int) -> Examples:
    return Examples("t", data, range(1000), list, lambda read: ({}, read), workers=workers)


def test_workers_read_some_batches_ahead_and_end_with_their_pass() -> None:
    data = Watched()
    order = ((0, range(start, start + 4)) for start in range(0, 1000, 4))
    batches = read_ahead([watched(data, 2)], order, 2)
    assert next(batches) == (0, [0, 1, 2, 3])
    assert data.threads <= {"loader_0", "loader_1"}
    batches.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name.startswith("loader"):
            thread.join(10)
    assert data.read <= 4 * (AHEAD * 2 + 1)  # 20 of 1,000 rows


def test_what_a_worker_cannot_read_is_told_where_its_batch_is_asked_for() -> None:
    batches = read_ahead([watched(Watched(broken=5), 2)], ((0, [row]) for row in range(9)), 2)
    assert [items for _, items in itertools.islice(batches, 5)] == [[0], [1], [2], [3], [4]]
    with pytest.raises(ValueError, match="row 5 is broken"):
        next(batches)


def test_a_source_that_is_not_made_for_threads_is_read_without() -> None:
    one, other = Watched(), Watched()
    data = ClientData({"train": {"t": [watched(one, 2), watched(other, 0)]}})
    list(itertools.islice(data.training_batches(4, 41, CPU), 20))
    assert one.threads | other.threads == {threading.current_thread().name}


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


def of_loader(loader: DataLoader[Any]) -> OwnLoader:
    return OwnLoader("t", loader, lambda own: own)


def pass_over(loader: DataLoader[Any]) -> list[list[int]]:
    return [batch.target.tolist() for batch in of_loader(loader).once(CPU)]


class Rows(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> int:
        return row


class Evens(Sampler[int]):
    """Every other row, the last first."""

    def __iter__(self) -> Iterator[int]:
        return iter([8, 6, 4, 2, 0])

    def __len__(self) -> int:
        return 5


def test_a_users_loader_is_iterated_as_it_is() -> None:
    assert pass_over(DataLoader(Rows(5), batch_size=2)) == [[0, 1], [2, 3], [4]]
    assert pass_over(DataLoader(Rows(5), batch_size=2, drop_last=True)) == [[0, 1], [2, 3]]
    assert pass_over(DataLoader(Rows(9), batch_size=3, sampler=Evens())) == [[8, 6, 4], [2, 0]]
    assert pass_over(DataLoader(Rows(9), batch_sampler=BatchSampler(Evens(), 4, True))) == [[8, 6, 4, 2]]
    summed = DataLoader(Rows(5), batch_size=3, collate_fn=lambda rows: torch.tensor(sum(rows)))
    assert pass_over(summed) == [3, 7]
    heavy = torch.tensor([0.0, 1.0, 0.0])
    assert pass_over(DataLoader(Rows(3), batch_size=4, sampler=WeightedRandomSampler(heavy, 4))) == [[1, 1, 1, 1]]


def test_the_number_of_examples_is_the_samplers() -> None:
    assert len(of_loader(DataLoader(Rows(9), batch_size=3, sampler=Evens()))) == 5
    assert len(of_loader(DataLoader(Rows(9), batch_sampler=BatchSampler(Evens(), 2, True)))) == 4
    assert len(of_loader(DataLoader(Rows(0), batch_size=3))) == 0


@pytest.mark.parametrize(
    "loader",
    [DataLoader(Rows(3), batch_size=None), DataLoader(Rows(3), batch_sampler=([0], [1]).__iter__())],  # type: ignore[arg-type]
    ids=["no batches", "no length"],
)
def test_a_loader_whose_examples_cannot_be_counted_is_refused(loader: DataLoader[Any]) -> None:
    with pytest.raises(TypeError, match="task 't' has a DataLoader over a .* whose number of examples cannot be known"):
        of_loader(loader)


def test_passes_over_a_users_loader_follow_from_the_seed() -> None:
    own = of_loader(DataLoader(Rows(8), batch_size=4, shuffle=True))

    def taken(seed: int) -> list[list[int]]:
        return [batch.target.tolist() for batch in itertools.islice(own.passes(seed, 6, CPU), 6)]

    one = taken(1)
    assert one == taken(1) != taken(2)
    assert all(sorted(a + b) == list(range(8)) for a, b in zip(one[::2], one[1::2], strict=True))
    assert one[:2] != one[2:4]


def test_a_short_participation_sees_all_of_a_loader_in_a_fixed_order_in_the_end() -> None:
    own = of_loader(DataLoader(Rows(8), batch_size=1))
    first = [next(own.passes(seed, 2, CPU)).target.item() for seed in range(40)]
    assert set(first) == set(range(8))
    pairs = [[b.target.item() for b in itertools.islice(own.passes(seed, 2, CPU), 2)] for seed in range(8)]
    assert all(b == (a + 1) % 8 for a, b in pairs)
    assert next(own.passes(5, 8, CPU)).target.item() == 0  # a whole pass begins where the loader does


@pytest.mark.parametrize("batches", [False, True], ids=["sampler", "batch sampler"])
@pytest.mark.parametrize(
    "sampler",
    [SubsetRandomSampler(range(3, 13)), WeightedRandomSampler(torch.ones(10), 200)],
    ids=["subset", "weighted"],
)
def test_a_share_of_the_samplers_rows_is_set_aside(sampler: Sampler[int], batches: bool) -> None:
    if batches:
        loader = DataLoader(Rows(20), batch_sampler=BatchSampler(sampler, 3, False))
    else:
        loader = DataLoader(Rows(20), batch_size=3, sampler=sampler)
    rest, held = split_off(loader, 0.3, seed=1)
    trained = {row for batch in pass_over(rest) for row in batch}
    aside = [row for batch in pass_over(held) for row in batch]
    may = set(range(3, 13)) if isinstance(sampler, SubsetRandomSampler) else set(range(10))
    assert len(aside) == 3
    assert not trained & set(aside)
    assert trained | set(aside) == may
    assert [row for b in pass_over(split_off(loader, 0.3, seed=1)[1]) for row in b] == aside


def test_a_loader_without_a_batch_once_rows_are_held_out_is_refused() -> None:
    loader = DataLoader(Rows(10), batch_size=10, drop_last=True)
    with pytest.raises(TypeError, match="yields no batch once 2 rows of 10 are held out: lower its batch size"):
        split_off(loader, 0.2, 1)


def test_looking_at_a_loader_leaves_its_generator_where_it_was() -> None:
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(Rows(8), batch_size=4, shuffle=True, generator=generator)
    before, everywhere = generator.get_state(), torch.get_rng_state()
    of_loader(loader)
    split_off(loader, 0.25, 1)
    assert generator.get_state().equal(before)
    assert torch.get_rng_state().equal(everywhere)


class Halves(Sampler[int]):
    """Half of ten rows, by a generator of the process."""

    def __init__(self, draw: Callable[[], list[int]]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw()[:5])


@pytest.mark.parametrize(
    "draw",
    [lambda: random.sample(range(10), 10), lambda: np.random.permutation(10).tolist()],
    ids=["random", "numpy"],
)
def test_what_a_loader_draws_by_random_or_numpy_follows_from_the_seed(draw: Callable[[], list[int]]) -> None:
    loader = DataLoader(Rows(10), batch_size=2, sampler=Halves(draw))
    taken = [[b.target.tolist() for b in itertools.islice(of_loader(loader).passes(s, 6, CPU), 6)] for s in (1, 1, 2)]
    assert taken[0] == taken[1] != taken[2]
    held = [[b.target.tolist() for b in of_loader(split_off(loader, 0.4, 1)[1]).once(CPU)] for _ in range(2)]
    assert held[0] == held[1]


class Backwards(DataLoader[Any]):
    """Draws rows as it likes."""

    def __iter__(self) -> Any:
        return iter([torch.tensor([row]) for row in reversed(range(len(self.dataset)))])  # type: ignore[arg-type]


def test_a_loader_that_iterates_in_its_own_way_keeps_it_and_sets_no_share_aside() -> None:
    loader = Backwards(Rows(3), batch_size=2)
    own = of_loader(loader)
    assert [b.target.item() for b in itertools.islice(own.passes(1, 1, CPU), 4)] == [2, 1, 0, 2]
    assert own.lone(CPU) is None
    assert beginning(loader, 1) is extremes(loader) is loader
    with pytest.raises(TypeError, match="is a Backwards with an `__iter__` of its own, .*: give `validation` data"):
        split_off(loader, 0.5, 1)


def test_tasks_that_share_a_loader_with_workers_have_passes_of_their_own() -> None:
    shared = DataLoader(Rows(4), batch_size=1, num_workers=1, persistent_workers=True)
    passes = [of_loader(shared).passes(0, 4, CPU) for _ in range(2)]
    assert [[next(own).target.item() for own in passes] for _ in range(4)] == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_every_turn_has_each_task_once_and_each_place_has_each_task() -> None:
    """Also where a participation is shorter than a turn, and at every other step."""
    drawn = [list(itertools.islice(turns("abc", seed), 9)) for seed in range(30)]
    assert all(sorted(found[at : at + 3]) == ["a", "b", "c"] for found in drawn for at in (0, 3, 6))
    assert all({found[at] for found in drawn} == {"a", "b", "c"} for at in range(9))
    assert drawn[0] == list(itertools.islice(turns("cab", 0), 9))


def test_loaders_and_data_sets_take_turns() -> None:
    a, c = (OwnLoader(name, DataLoader(Rows(2), batch_size=1), lambda own: own) for name in "ac")
    data = ClientData({"train": {"c": [c], "b": [named("b", "b", 4, None)], "a": [a]}, "test": {"a": [a]}})
    batches = list(itertools.islice(data.training_batches(2, 41, CPU, count=6), 6))
    assert [batch.task for batch in batches] == list(itertools.islice(turns("abc", 41), 6))
    assert [b.target.item() for b in batches if b.task == "a"] == [0, 1]
    assert [b.target.item() for b in data.batches("test", 64, CPU)] == [0, 1]
    assert data.sizes("train") == {"a": 2, "b": 4, "c": 2}


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
