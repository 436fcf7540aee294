"""Tests of `tap_flower.data.packaged`: the demo's data."""

import builtins
import collections
import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from tap_flower.data import packaged

easy_vqa = pytest.importorskip("easy_vqa", reason='the demo data need: pip install "tap-flower[demo]"')
sklearn_datasets = pytest.importorskip("sklearn.datasets", reason='the demo data need: pip install "tap-flower[demo]"')
pytest.importorskip("emoji", reason='the demo data need: pip install "tap-flower[demo]"')

PAIRS = list(itertools.combinations(packaged.SPLITS, 2))
EVERY = list(itertools.product(packaged.DATASETS, packaged.SPLITS))


def items(split: str) -> set[str]:
    """The items of a split over all data sets."""
    return {item for name in packaged.DATASETS for item in packaged.load(name, split)["item"]}


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_item_across_all_data_sets(one: str, other: str) -> None:
    assert not items(one) & items(other)


def test_data_sets_that_share_items_really_do() -> None:
    shared = set(packaged.load("shapes", "train")["item"]) & set(packaged.load("questions", "train")["item"])
    assert len(shared) > 400


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_no_image_is_in_two_splits(one: str, other: str) -> None:
    def contents(split: str) -> set[bytes]:
        found = set()
        for name in ("shapes", "questions", "digits"):
            encoded = packaged.load(name, split).cast_column("image", datasets.Image(decode=False))
            found.update(entry["bytes"] for entry in encoded["image"])
        return found

    assert not contents(one) & contents(other)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_no_text_with_its_label_is_in_two_splits(one: str, other: str) -> None:
    for name, key in (("names", "label"), ("dates", "target")):
        rows = [
            {(str(text).casefold(), str(value).casefold()) for text, value in zip(data["text"], data[key], strict=True)}
            for data in (packaged.load(name, one), packaged.load(name, other))
        ]
        assert not rows[0] & rows[1], name


def test_every_day_is_in_one_split_however_it_is_written() -> None:
    found: dict[str, dict[str, str]] = {}
    for split in packaged.SPLITS:
        for row in packaged.load("dates", split):
            found.setdefault(row["target"], {})[row["text"]] = split
    assert len(found) == 366
    assert {len(set(splits.values())) for splits in found.values()} == {1}
    assert {"14. März", "March 14", "14 de março", "14 mars", "14 Mart"} <= found["03-14"].keys()


def test_a_name_has_one_language_only() -> None:
    languages = collections.defaultdict(set)
    for split in packaged.SPLITS:
        data = packaged.load("names", split)
        for text, label in zip(data["text"], data["label"], strict=True):
            languages[text.casefold()].add(label)
    assert {text for text, labels in languages.items() if len(labels) > 1} == set()
    # Two names that do differ, and one that English, French and German share and that is left out.
    assert languages["reiscracker"] == {packaged.LANGUAGES.index("de")}
    assert "bikini" not in languages


def test_variants_by_gender_and_tone_do_not_straddle_splits() -> None:
    emoji = importlib.import_module("emoji")
    emoji.config.load_language(list(packaged.LANGUAGES))
    texts: dict[str, set[str]] = {}
    english = packaged.LANGUAGES.index("en")
    for split in packaged.SPLITS:
        names = packaged.load("names", split)
        for text, label in zip(names["text"], names["label"], strict=True):
            if label == english:
                texts.setdefault(text, set()).add(split)
    assert texts["man artist"] == texts["woman artist"]
    assert texts["person walking"] == texts["man walking"] == texts["woman walking facing right"]
    assert texts["merman"] == texts["mermaid"]
    assert not [text for text in texts if "skin tone" in text]
    assert "New Zealand" not in texts
    # Nothing but tones, flags, families and names that two languages share is left out: count without the module's own code.
    languages: dict[str, set[str]] = {}
    kept = set()
    for symbol, entry in emoji.EMOJI_DATA.items():
        name = emoji.demojize(symbol)
        flag = entry["es"].startswith(":bandera_") and entry["tr"].startswith(":bayrak_")
        if entry["status"] == 2 and "skin_tone" not in name and not flag and not name.startswith(":family_"):
            kept.add(name)
            for language in packaged.LANGUAGES:
                languages.setdefault(entry[language].casefold(), set()).add(language)
    assert texts.keys() == {name.strip(":").replace("_", " ") for name in kept if languages[name.casefold()] == {"en"}}


COLUMNS = {
    "shapes": ["item", "image", "label"],
    "questions": ["item", "image", "question", "answer"],
    "digits": ["item", "image", "label"],
    "names": ["item", "text", "label"],
    "dates": ["item", "text", "target", "language"],
}


@pytest.mark.parametrize(("name", "split"), EVERY)
def test_columns_and_types(name: str, split: str) -> None:
    data = packaged.load(name, split)
    assert isinstance(data, datasets.Dataset)
    assert data.column_names == COLUMNS[name]
    row = data[0]
    for key, value in row.items():
        if key == "image":
            assert (value.mode, value.size) == ("RGB", (64, 64))
        elif key == "label":
            assert isinstance(data.features[key], datasets.ClassLabel)
            assert isinstance(value, int)
        else:
            assert isinstance(value, str)
            assert value
            assert value == value.strip()
    for key in {"text", "target"} & set(data.column_names):
        assert not [text for text in data[key] if ":" in text or "_" in text or not text]


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("shapes", (1500, 1000, 150, 300)),
        ("questions", (15000, 1000, 150, 300)),
        ("digits", (600, 500, 150, 300)),
        ("names", (4000, 3000, 150, 300)),
        ("dates", (2000, 1200, 500, 700)),
    ],
)
def test_sizes(name: str, least: tuple[int, ...]) -> None:
    rows = [len(packaged.load(name, split)) for split in packaged.SPLITS]
    assert all(have >= need for have, need in zip(rows, least, strict=True)), rows


@pytest.mark.parametrize(("name", "classes"), [("shapes", 24), ("digits", 10), ("names", 8)])
@pytest.mark.parametrize("split", packaged.SPLITS)
def test_every_class_is_there_and_none_dominates(name: str, classes: int, split: str) -> None:
    counts = collections.Counter(packaged.load(name, split)["label"])
    assert set(counts) == set(range(classes))
    assert max(counts.values()) < 3.5 * min(counts.values())


def test_a_client_slice_of_questions_repeats_no_image() -> None:
    for split in ("train", "validation", "test"):
        data = packaged.load("questions", split)
        assert len(set(data["item"])) == len(data)
    assert set(packaged.load("questions", "test")["answer"]) == set(easy_vqa.get_answers())


# easy-vqa's generator draws near these colours, on a near-white background.
COLOURS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (150, 75, 0),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


def test_shapes_labels_agree_with_the_pixels() -> None:
    data = packaged.load("shapes", "test").select(range(300))
    names = data.features["label"].names
    filled = collections.defaultdict(list)
    for image, label in zip(data["image"], data["label"], strict=True):
        colour, shape = names[label].split()
        pixels = np.asarray(image).astype(int)
        inside = np.abs(pixels - pixels[0, 0]).sum(-1) > 60  # the corner is background
        if pixels[0, 0].sum() < 600 or inside.sum() < 20:
            continue
        drawn = np.median(pixels[inside], axis=0)
        nearest = min(COLOURS, key=lambda name: float(np.abs(drawn - COLOURS[name]).sum()))
        assert nearest == colour, (names[label], drawn)
        rows, columns = np.nonzero(inside)
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        filled[shape].append(inside.sum() / box)
    assert sum(map(len, filled.values())) > 250
    # Of its bounding box a circle fills pi/4; a rectangle, upright, all; a triangle half or less.
    medians = {shape: float(np.median(values)) for shape, values in filled.items()}
    assert medians["circle"] == pytest.approx(np.pi / 4, abs=0.05)
    assert medians["rectangle"] > 0.9
    assert medians["triangle"] < 0.65


def test_questions_are_the_packages_own() -> None:
    paths = {"train": easy_vqa.get_train_image_paths(), "test": easy_vqa.get_test_image_paths()}
    asked = {"train": easy_vqa.get_train_questions(), "test": easy_vqa.get_test_questions()}
    known = {part: set(zip(*questions, strict=True)) for part, questions in asked.items()}
    data = packaged.load("questions", "train").cast_column("image", datasets.Image(decode=False))
    for row in data.select(range(100)):
        _, part, number = row["item"].split("/")
        assert (row["question"], row["answer"], int(number)) in known[part]
        assert Path(paths[part][int(number)]).read_bytes() == row["image"]["bytes"]


@pytest.mark.parametrize("split", packaged.SPLITS)
def test_digits_are_scikit_learns(split: str) -> None:
    bunch = sklearn_datasets.load_digits()
    data = packaged.load("digits", split)
    for item, image, label in zip(data["item"], data["image"], data["label"], strict=True):
        number = int(item.split("/")[1])
        pixels = np.asarray(image).astype(float) * 16 / 255
        assert (pixels.max(-1) == pixels.min(-1)).all()
        # Each value is found again in the middle of its square of 8x8 pixels, as far as the smoothing lets it.
        middle = (pixels[3::8, 3::8, 0] + pixels[4::8, 4::8, 0] + pixels[3::8, 4::8, 0] + pixels[4::8, 3::8, 0]) / 4
        assert np.abs(middle - bunch.images[number]).max() < 1.5
        assert data.features["label"].int2str(label) == str(bunch.target[number])


def test_names_are_the_emoji_packages() -> None:
    emoji = importlib.import_module("emoji")
    emoji.config.load_language(list(packaged.LANGUAGES))
    data = packaged.load("names", "validation")
    for text, label in zip(data["text"], data["label"], strict=True):
        symbol = emoji.emojize(f":{text.replace(' ', '_')}:", language=packaged.LANGUAGES[label])
        assert emoji.is_emoji(symbol), (text, label)


def test_same_rows_in_another_process() -> None:
    script = (
        "from tap_flower.data import packaged\n"
        "print([packaged.load(n, 'train')['item'][:20] for n in ('shapes', 'names', 'dates')])"
    )
    here = str([packaged.load(name, "train")["item"][:20] for name in ("shapes", "names", "dates")])
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8"}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, env=environment)
    assert ran.stdout.decode().strip() == here


def test_rows_are_shuffled() -> None:
    for name in ("shapes", "digits", "names"):
        labels = packaged.load(name, "train")["label"]
        repeats = sum(one == other for one, other in itertools.pairwise(labels))
        assert repeats < 2 * len(labels) / len(set(labels))


def test_known_splits_stay() -> None:
    # Written down once: a change of the splits would put items that the committed backbone has seen into test.
    known = {
        "easy-vqa/train/0": "public",
        "digits/0": "train",
        "days/03-14": "public",
        "emoji/🍞": "train",
        "emoji/🩳": "test",
    }
    assert {item: packaged.split_of(item) for item in known} == known


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'digit': choose one of shapes, questions, digits, names, dates"):
        packaged.load("digit", "train")
    with pytest.raises(ValueError, match=r"'names' has no split 'dev': choose one of public, train, validation, test"):
        packaged.load("names", "dev")


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("shapes", "easy_vqa", "easy-vqa"),
        ("questions", "easy_vqa", "easy-vqa"),
        ("digits", "sklearn.datasets", "scikit-learn"),
        ("names", "emoji", "emoji"),
        ("dates", "babel.dates", "babel"),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str) -> None:
    for cache in (packaged.load, packaged._easy_vqa, packaged._emoji):
        cache.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"'{package}'.*pip install 'tap-flower\[demo\]'"):
        packaged.load(name, "train")


def test_importing_the_module_needs_no_data_package(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = builtins.__import__

    def guarded(name: str, *rest: Any, **more: Any) -> Any:
        assert name.split(".")[0] not in {"easy_vqa", "sklearn", "emoji"}
        return ordinary(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", guarded)
    source = importlib.util.find_spec("tap_flower.data.packaged")
    assert source is not None
    assert source.loader is not None
    source.loader.exec_module(importlib.util.module_from_spec(source))
