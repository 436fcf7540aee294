from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cachetools import LRUCache
from PIL import Image

from tap_flower.config import client_specs, load_config
from tap_flower.core.tasks import IGNORE, IMAGE_STD
from tap_flower.data import images, packaged
from tap_flower.data.batching import ClientData
from tap_flower.data.examples import Examples
from tap_flower.data.fields import ImageForm
from tap_flower.data.images import LazyImages, normalise, processor_form
from tap_flower.data.loading import load_client_data
from tap_flower.data.spec import ClientSpec, Source
from tap_flower.data.text import load_tokenizer, pad_inputs, pad_targets
from tap_flower.errors import SpecError
from tap_flower.hub import locate

CPU = torch.device("cpu")
FORM = ImageForm(64, "squeeze", (0.5071, 0.4865, 0.4409), IMAGE_STD)
"""The paper's."""
CLIENTS = client_specs(load_config("demo"))
PAD = 0
"""Number of the padding token of the demo's tokenizer."""


def data(spec: ClientSpec, seed: int = 1) -> ClientData:
    return load_client_data(spec, load_tokenizer(locate("demo")), 40, seed)


def rows_of(examples: Examples) -> list[int]:
    """The rows of the data set that examples are."""
    return [examples.dataset.rows[place] for place in examples.rows]


def changed(index: int, **changes: Any) -> ClientSpec:
    return replace(CLIENTS[index], tasks=(replace(CLIENTS[index].tasks[0], **changes),))


def test_clients_of_one_run_share_no_training_row() -> None:
    seen: dict[tuple[str, int], str] = {}
    for spec in CLIENTS:
        client = data(spec)
        for task in spec.tasks:
            rows = rows_of(client.splits["train"][task.name][0])
            assert len(rows) == len(set(rows))
            for row in rows:
                # Questions about one image are rows of their own.
                assert (task.train[0].name, row) not in seen, (spec.name, seen.get((task.train[0].name, row)))
                seen[task.train[0].name, row] = spec.name


def test_every_pair_is_held_by_two_clients_or_more() -> None:
    for preset, least in (("demo", 2), ("thirty", 3)):
        held = Counter(task.pair for spec in client_specs(load_config(preset)) for task in spec.tasks)
        assert min(held.values()) >= least
        assert len(held) == 7


def test_rows_depend_on_the_seed_and_on_nothing_else() -> None:
    one, again, other = (rows_of(data(CLIENTS[1], seed).splits["train"]["languages"][0]) for seed in (1, 1, 2))
    assert one == again != other
    test = [rows_of(data(CLIENTS[1], seed).splits["test"]["languages"][0]) for seed in (1, 2)]
    assert test[0] == test[1]  # every seed is judged on the same test rows


def test_without_validation_rows_a_fifth_is_set_aside() -> None:
    client = data(changed(1, validation=(), train=(Source("packaged", "names", "train", (0, 50)),)))
    train, held_out = (client.splits[split]["languages"][0] for split in ("train", "validation"))
    assert (len(train), len(held_out)) == (40, 10)
    assert sorted(rows_of(train) + rows_of(held_out)) == list(range(50))
    assert not set(rows_of(train)) & set(rows_of(held_out))
    raw = packaged.load("names", "train")
    assert [train[0]["label"], held_out[3]["label"]] == [
        raw[rows_of(train)[0]]["label"],
        raw[rows_of(held_out)[3]]["label"],
    ]


def test_batches_take_turns_and_cover_everything() -> None:
    client = data(CLIENTS[3])
    batches = list(itertools.islice(client.training_batches(35, 3, CPU), 4))
    assert [sorted(b.task for b in turn) for turn in (batches[:2], batches[2:])] == [["digits", "languages"]] * 2
    assert {b.task: b.inputs["domain"] for b in batches} == {"digits": "handwriting", "languages": "names"}
    epoch = torch.cat([b.inputs["image"].flatten(1) for b in batches if b.task == "digits"])
    assert len(epoch.unique(dim=0)) == len(epoch) == 70
    again = next(client.training_batches(35, 3, CPU))
    assert torch.equal(again.inputs["image"], batches[0].inputs["image"])
    other = next(client.training_batches(35, 4, CPU))
    assert not torch.equal(other.inputs["image"], batches[0].inputs["image"])


def test_texts_of_about_one_length_share_a_batch() -> None:
    dates, client = data(changed(4)), data(CLIENTS[1])
    (examples,) = dates.splits["train"]["dates"]
    assert examples.lengths.tolist() == [len(example["text"]) + len(example["target"]) for example in examples]
    (examples,) = client.splits["train"]["languages"]
    lengths = examples.lengths
    assert lengths.tolist() == [len(example["text"]) for example in examples]
    ordered = examples.by_length(range(len(examples)))
    assert sorted(ordered) == list(range(len(examples)))
    assert (np.diff(lengths[ordered]) <= 0).all()
    epoch = list(itertools.islice(client.training_batches(8, 1, CPU, True), len(examples) // 8))
    own = [(batch.inputs["input_ids"] != PAD).sum(1) for batch in epoch]
    assert np.mean([tokens.double().std() for tokens in own]) < 0.6 * np.std(lengths)
    ends = [int(tokens.max()) for tokens in own]
    assert ends not in (sorted(ends), sorted(ends, reverse=True))  # long and short batches come in turns
    tested = list(client.batches("test", 50, CPU))
    assert sum(len(batch.target) for batch in tested) == client.sizes("test")["languages"]


def test_a_client_may_choose_its_own_batch_size() -> None:
    spec = changed(1, batch_size=5)
    assert len(next(data(spec).training_batches(8, 1, CPU)).target) == 5


def test_a_text_batch() -> None:
    batch = next(data(changed(4)).training_batches(8, 1, CPU))
    tokenizer = load_tokenizer(locate("demo"))
    ids, mask, target = batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.target
    assert (ids[:, 0] == tokenizer.cls_token_id).all()
    assert ((ids == tokenizer.pad_token_id) == (mask == 0)).all()
    assert mask.sum(1).max() == ids.shape[1]  # padded to the longest of the batch
    assert batch.inputs["target_length"] == target.shape[1]
    ends = (target != IGNORE).sum(1) - 1
    assert (target[torch.arange(8), ends] == tokenizer.sep_token_id).all()
    assert (target[:, 0] != tokenizer.cls_token_id).all()


def test_texts_that_are_cut_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["a " * 37, "a " * 38, "a " * 39, "a " * 60]  # with the two special tokens 39, 40, 41 and 62
    lines = [f"{text},{target}" for text, target in zip(words, [*words[1:3], "a", "b"], strict=True)]
    (tmp_path / "long.csv").write_text("\n".join(["question,answer", *lines]))
    source = Source("csv", path=str(tmp_path / "long.csv"))
    spec = changed(
        1,
        kind="text_generation",
        columns={"text": "question", "target": "answer"},
        classes=(),
        train=(source,),
        validation=(source,),
        test=(source,),
    )
    found = data(spec)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"{source}: 2 of 4 texts have up to 62 tokens, and are cut at model.text_length = 40",
        # and a separator behind 38, 39, 1 and 1 tokens
    ]
    assert found.sizes("test") == {"languages": 4}


def test_no_text_of_the_demo_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    for client in CLIENTS:
        data(client)
    assert [record.getMessage() for record in caplog.records] == []


def test_the_target_of_image_generation_is_the_image() -> None:
    spec = replace(CLIENTS[5], tasks=CLIENTS[5].tasks[1:])
    batch = next(data(spec).training_batches(4, 1, CPU))
    assert torch.equal(batch.target, batch.inputs["image"])


def test_images_are_decoded_when_used_and_once() -> None:
    images = LazyImages(packaged.load("shapes", "train").select(range(20)), "image", FORM)
    assert images.decodes == 0
    first = [images[3], images[5]]
    again = [images[5], images[3]]
    assert images.decodes == 2
    assert torch.equal(first[0], again[1])
    assert first[0].dtype == torch.uint8
    assert first[0].shape == (3, 64, 64)


def test_decoded_images_take_a_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_decoded", LRUCache(3 * 64 * 64 * 3, getsizeof=lambda pixels: pixels.nbytes))  # three
    rows = packaged.load("shapes", "train").select(range(20))
    found, other = LazyImages(rows, "image", FORM), LazyImages(rows, "image", FORM)
    found[0], found[1], other[0], found[0]
    assert (found.decodes, other.decodes) == (2, 1)
    found[2]  # in place of image 1
    found[0], other[0]
    assert (found.decodes, other.decodes) == (3, 1)
    pixels = found[1]
    assert found.decodes == 4
    assert torch.equal(pixels, LazyImages(rows, "image", FORM)[1])


def test_workers_keep_to_the_bound_and_give_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the bound holds less than is read ahead."""
    for name, side in (("a", 70), ("b", 200)):
        (tmp_path / name).mkdir()
        for number in range(12):
            Image.new("RGB", (side, 64), (number * 20, side, 9)).save(tmp_path / name / f"{number}.jpg")
    source = Source("imagefolder", path=str(tmp_path))
    spec = changed(
        1, kind="image_classification", modalities=("image",), columns={"image": "image", "label": "label"},
        classes=("a", "b"), image=FORM, train=(source,), test=(source,), validation=(source,), batch_size=None,
    )  # fmt: skip
    kept: LRUCache[Any, torch.Tensor] = LRUCache(5 * 64 * 64 * 3, getsizeof=lambda pixels: pixels.nbytes)
    monkeypatch.setattr(images, "_decoded", kept)
    found = []
    for workers in (0, 2):
        client = load_client_data(spec, load_tokenizer(locate("demo")), 40, 1, workers=workers)
        batches = [*itertools.islice(client.training_batches(4, 3, CPU), 12), *client.batches("test", 64, CPU)]
        found.append(torch.cat([batch.inputs["image"] for batch in batches]))
        assert 0 < sum(pixels.nbytes for pixels in kept.values()) <= kept.maxsize
    assert len(found[0]) == 12 * 4 + 24
    assert torch.equal(found[0], found[1])


def test_an_image_larger_than_the_bound_is_read_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_decoded", LRUCache(100, getsizeof=lambda pixels: pixels.nbytes))
    found = LazyImages(packaged.load("shapes", "train").select(range(2)), "image", FORM)
    assert torch.equal(found[0], found[0])
    assert found.decodes == 2


def test_pixels_are_normalised_once() -> None:
    pixels = torch.zeros(1, 3, 1, 2, dtype=torch.uint8)
    pixels[..., 1] = 255
    found = normalise(pixels, FORM)
    for channel in range(3):
        black, white = found[0, channel, 0].tolist()
        assert black == pytest.approx(-FORM.mean[channel] / IMAGE_STD[channel])
        assert white == pytest.approx((1 - FORM.mean[channel]) / IMAGE_STD[channel])


def test_the_demo_backbones_own_processor_gives_the_papers_form_but_for_the_size() -> None:
    assert processor_form("demo") == replace(FORM, size=40)


def test_padding() -> None:
    padded = pad_inputs([[5, 6, 7], [8]], pad=9)
    assert padded["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert pad_inputs([[1, 2], [3, 4]], pad=0).keys() == {"input_ids"}
    assert pad_targets([[1], [2, 3]]).tolist() == [[1, IGNORE], [2, 3]]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"train": (Source("packaged", "nomes", "train"),)}, "train cannot be read from .*'nomes'"),
        ({"train": (Source("packaged", "names", "train", (0, 10**6)),)}, "train takes rows 0 to 1000000 of 'names'"),
        ({"columns": {"text": "txt", "label": "label"}}, "train has no column 'txt' for text: choose among"),
        (
            {"classes": ("en", "es")},
            r"train has label '[a-z]+' in row \d+, but the client spec has 2 classes with labels 'en', 'es'",
        ),
    ],
)
def test_a_spec_that_does_not_fit_the_data_is_an_error_that_says_where(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError, match=f"client 'client-1': task 'languages'.*{problem}"):
        data(changed(1, **changes))
