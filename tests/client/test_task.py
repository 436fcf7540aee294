"""What a user says of a task: its data, its batches and what is held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from tap_flower import Client, Task
from tap_flower.config import HyperParameters
from tap_flower.errors import ClientError, RunError
from tests.small_projects import Loop, Net, Normed, loader, run, session, task
from tests.toys import pixels


def test_rows_of_a_samplers_other_half_are_never_trained_on() -> None:
    x = torch.arange(20.0).repeat(4, 1).T
    whole = TensorDataset(x, torch.zeros(20, dtype=torch.int64))
    train, test = (DataLoader(whole, 3, sampler=SubsetRandomSampler(range(*ends))) for ends in ((12,), (12, 20)))
    data = session(task(train, test)).data
    seen = {
        split: {
            int(v) for batch in data.batches(split, 64, torch.device("cpu")) for v in batch.inputs["batch"][0][:, 0]
        }
        for split in ("train", "validation", "test")
    }
    assert data.sizes("train") == {"digits": 10}  # a fifth of the sampler's twelve rows is set aside
    assert data.sizes("validation") == {"digits": 2}
    assert seen["test"] == set(range(12, 20))
    assert seen["train"] | seen["validation"] == set(range(12))
    assert not seen["train"] & seen["validation"]


@pytest.mark.parametrize("data", [loader(10), pixels(10, 0)], ids=["loader", "data set"])
def test_validation_is_a_share_or_data_or_none(data: Any) -> None:
    sizes = {share: session(task(data, validation=share)).data.sizes("validation")["digits"] for share in (0.1, 0.5)}
    assert sizes == {0.1: 1, 0.5: 5}
    given = session(task(data, validation=loader(7, 3))).data
    assert (given.sizes("train"), given.sizes("validation")) == ({"digits": 10}, {"digits": 7})
    with pytest.raises(ClientError, match="task 'digits' has validation=None, and the run compares losses of held-out"):
        session(task(data, validation=None))
    with pytest.raises(ClientError, match="task 'digits' has validation 1.5: give a share between 0 and 1"):
        task(data, validation=1.5)
    with pytest.raises(ClientError, match="task 'digits' has batch_size 0: give a whole number from 1 on"):
        task(pixels(4, 0), batch_size=0)


def test_a_batch_size_beside_a_loaders_own_is_refused() -> None:
    with pytest.raises(ClientError, match="has batch_size=2 and a DataLoader, which has its own batch size"):
        session(task(batch_size=2))
    with pytest.raises(ClientError, match="has a DataLoader that yields no batch"):
        session(task(loader(3, drop_last=True)))


def test_a_test_loader_has_its_own_batch_size() -> None:
    data = session(task(test=loader(8, 1, size=5))).data
    assert [len(batch.target) for batch in data.batches("test", 64, torch.device("cpu"))] == [5, 3]


def test_without_test_examples_a_client_is_not_tested_and_the_run_goes_on(tmp_path: Path) -> None:
    result = run(tmp_path, lambda number: task(test=loader(0 if number else 8, 1)))
    assert result.clients["c1"] == {"digits": {}}
    assert result.clients["c0"]["digits"].keys() == {"server", "server+finetune", "personal", "tap"}
    assert result.clients["c0"]["digits"]["tap"].items() <= result.tasks["digits"]["tap"].items()
    assert result.marks == {}


def test_a_run_without_any_test_examples_ends_well(tmp_path: Path) -> None:
    result = run(tmp_path, lambda _: task(test=loader(0, 1)))
    assert (result.tasks, set(result.clients)) == ({}, {"c0", "c1"})


def test_one_example_is_enough_where_none_is_set_aside(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="task 'digits'.* one row, and one is to be set aside|one training example"):
        session(task(loader(1)))
    result = run(tmp_path, lambda _: task(loader(1), loader(1, 1)), "replacement.evidence=training")
    assert set(result.clients) == {"c0", "c1"}


def test_a_last_batch_of_one_works_or_is_refused_at_the_start(tmp_path: Path) -> None:
    nine, held = loader(9), pixels(4, 3)
    assert set(run(tmp_path, lambda _: task(nine, validation=held)).clients) == {"c0", "c1"}
    normed = Client("ann", Normed, [task(nine, validation=held)])
    with pytest.raises(
        ClientError, match="its loader has a batch of one example, .*: give the loader `drop_last=True`"
    ):
        normed.session(HyperParameters())
    Client("ann", Normed, [task(loader(9, drop_last=True), validation=held)]).session(HyperParameters())


def test_keep_best_is_true_or_false_and_needs_held_out_examples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RunError, match="the log of the node says where"):
        run(tmp_path / "a", lambda _: task(), **{"keep-best": "false"})
    assert "the node's keep-best is 'false': write keep-best=true or keep-best=false" in caplog.text
    run(tmp_path / "b", lambda _: task(), "replacement.evidence=training", **{"keep-best": True})
    assert "keep-best does nothing: no held-out examples say which state is best" in caplog.text


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: Loop().task(pixels(8, 0)), "has `fit`, and its train data are a TensorDataset: give a DataLoader"),
        (
            lambda: Loop().task(test=pixels(8, 0)),
            "has `score`, and its test data are a TensorDataset: give a DataLoader",
        ),
        (lambda: Loop().task(score=None), "has `fit`, and nothing to evaluate by: give `score`"),
    ],
)
def test_tasks_that_are_refused(made: Callable[[], Task], words: str) -> None:
    with pytest.raises(ClientError, match=f"task 'digits' {words}"):
        session(made())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"batch_size": 8.0}, "batch_size 8.0: give a whole number from 1 on"),
        ({"head_size": 3.0}, "head_size 3.0: give a whole number from 0 on"),
        ({"margin": "much"}, "margin 'much': give a number from 0 on"),
        ({"modalities": ["image", "image"]}, r"the modalities \['image', 'image'\]: give at least one, and each once"),
        ({"modalities": "image"}, "modalities of type str: give a list"),
        ({"domains": "web"}, "domains of type str: give a list"),
        ({"classes": "ab"}, "classes of type str: give a list"),
        ({"forward": "net"}, "a str as `forward`: give a function"),
    ],
)
def test_arguments_of_a_task_that_are_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ClientError, match=f"task 'digits' has {words}"):
        replace(task(), **more)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model": Net()}, " has a Net as `model`: give the function that builds the module, such as its class"),
        ({"model": "resnet18"}, " has a str as `model`: give the function that builds the module"),
        ({"tasks": task()}, " has a Task as `tasks`: give a list of Tasks"),
        ({"tasks": {"digits": task()}}, " has a dict as `tasks`: give a list of Tasks"),
        ({"components": ["trunk.*"]}, " has a list as `components`: give patterns by name"),
        ({"reach": {"digits": 3}}, ": `reach` of 'digits' is 3: give a pattern such as 'encoder.*', or a list"),
    ],
)
def test_arguments_of_a_client_that_are_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ClientError, match=f"client 'ann'{words}"):
        Client(**{"name": "ann", "model": Net, "tasks": [task()], **more})


@pytest.mark.parametrize("name", [3, None, "a b", "a/b"])
def test_names_are_texts_of_few_letters(name: Any) -> None:
    with pytest.raises(ClientError, match=f'client {name!r}: use a name of letters, .* such as f"client-{{context'):
        Client(name, Net, [task()])
    with pytest.raises(ClientError, match=f"{name!r} is no name: use letters, digits"):
        replace(task(), name=name)


def test_arguments_may_be_iterated_once() -> None:
    one = replace(task(), modalities=(word for word in ["image"]), batch_size=np.int64(2), train=pixels(4, 0))  # type: ignore[arg-type]
    client = Client("ann", Net, (of for of in [one]))  # type: ignore[arg-type]
    assert client.tasks == (one,)
    assert [(of.pair.modalities, of.batch_size) for of in client.tasks] == [(("image",), 2)]


def test_a_kind_by_its_name_is_refused() -> None:
    with pytest.raises(ClientError, match="task 'digits' has kind 'image_classification': give a TaskKind, such as"):
        Task("digits", "image_classification", ["image"], [], [])  # type: ignore[arg-type]
