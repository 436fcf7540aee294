"""The demo's data: real data that pip packages carry, so that nothing is downloaded at run time.

| data set | package | what a row is | label |
|---|---|---|---|
| `shapes` | easy-vqa | a 64x64 image of one coloured shape | 24 classes ("teal circle") |
| `questions` | easy-vqa | such an image with a question and its answer | - |
| `digits` | scikit-learn | a handwritten digit, 8x8 grey values enlarged to 64x64 | 10 classes |
| `names` | emoji | the name of an emoji in one of eight languages | 8 classes |
| `dates` | babel | a day of the year as one of eight languages writes it ("14. März"), and as ISO 8601 does ("03-14") | - |

**Splits.** Every row has an `item`: the image, the digit, the emoji or the day that it comes from. The split of a row
depends on a hash of its item alone, so that an item is in one split in all data sets that share it (`shapes` and
`questions`; a day in all languages), and stays there whatever a run's seed is and whatever another version of a package
adds.
`public` is for pretraining a backbone, `train` for the clients, `validation` for choices, `test` for reports.

**What is left out of the emoji names**, and why:

* variants by skin tone: their names repeat the base name with the same few words added;
* flags: the word for "flag" and a country's name, which many languages share;
* families listed by their members ("family: man, woman, boy"): some 25 repetitions of six words;
* a name that two of the eight languages share ("bikini", "ambulance"), since nothing tells its language.

Variants by gender or direction ("man artist", "woman artist", "artist") are kept, as one item; emoji which share a name
in some language are one item too. So the same text with the same label is never in two splits.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib
import io
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

from tap_flower.plain import install

SPLITS = ("public", "train", "validation", "test")
DATASETS = ("shapes", "questions", "digits", "names", "dates")

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
LANGUAGES = ("en", "es", "pt", "it", "fr", "de", "id", "tr")

# Upper bounds of the four splits on the unit interval, in the order of SPLITS.
_BOUNDS = (0.41, 0.71, 0.805, 1.0)
_IMAGE_SIZE = 64

Row = dict[str, Any]


@functools.cache
def load(name: str, split: str) -> datasets.Dataset:
    """Returns one split of a demo data set, rows in a fixed shuffled order.

    Columns: `item` (str) in all of them, and `image` (64x64 RGB), `label` (`shapes`, `digits`); `image`, `question`,
    `answer` (`questions`); `text`, `label` (`names`); `text`, `target`, `language` (`dates`). Labels are `ClassLabel`.

    Of `questions`, the split `public` has all questions about an image (about ten), the other splits have one of them,
    so that disjoint slices of rows, one for each client, are disjoint sets of images too.

    Args:
        name: one of `DATASETS`.
        split: one of `SPLITS`.

    Returns:
        The rows; the same object at each call, so do not change it in place.

    Raises:
        ValueError: unknown name or split.
        ModuleNotFoundError: the package that carries the data is not installed.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown demo data set {name!r}: choose one of {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"demo data set {name!r} has no split {split!r}: choose one of {', '.join(SPLITS)}")
    text, image, label = datasets.Value("string"), datasets.Image(), datasets.ClassLabel
    build, columns = {
        "shapes": (_shapes, {"image": image, "label": label(names=[f"{c} {s}" for c in COLOURS for s in SHAPES])}),
        "questions": (_questions, {"image": image, "question": text, "answer": text}),
        "digits": (_digits, {"image": image, "label": label(names=[str(digit) for digit in range(10)])}),
        "names": (_names, {"text": text, "label": label(names=list(LANGUAGES))}),
        "dates": (_dates, {"text": text, "target": text, "language": text}),
    }[name]
    features = datasets.Features({"item": text, **columns})
    rows = sorted(build(split), key=lambda row: _unit(repr([row[key] for key in features if key != "image"])))
    return datasets.Dataset.from_dict({key: [row[key] for row in rows] for key in features}, features=features)


def split_of(item: str) -> str:
    """Returns the split of an item, a function of the item's name alone."""
    position = _unit(f"tap-flower demo split: {item}")
    return next(split for split, bound in zip(SPLITS, _BOUNDS, strict=True) if position < bound)


def _unit(text: str) -> float:
    """Returns a hash of `text` as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _import(module: str, package: str) -> Any:
    """Imports a module that carries data, or says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the demo data need the Python package {package!r}, which is not installed ({error}): {install('demo')}",
            name=module,
        ) from error


# --- easy-vqa: shapes, questions ------------------------------------------------------------------


@functools.cache
def _easy_vqa() -> dict[str, tuple[Path, list[tuple[str, str]]]]:
    """Returns for each image its file and its (question, answer) pairs, by item, both parts of the package together."""
    package = _import("easy_vqa", "easy-vqa")
    parts = {
        "train": (package.get_train_image_paths(), package.get_train_questions()),
        "test": (package.get_test_image_paths(), package.get_test_questions()),
    }
    images: dict[str, tuple[Path, list[tuple[str, str]]]] = {}
    for part, (paths, (questions, answers, numbers)) in parts.items():
        for number, path in paths.items():
            images[f"easy-vqa/{part}/{number}"] = (Path(path), [])
        for question, answer, number in zip(questions, answers, numbers, strict=True):
            images[f"easy-vqa/{part}/{number}"][1].append((question, answer))
    return images


def _attribute(questions: Iterable[tuple[str, str]], values: tuple[str, ...], item: str) -> str | None:
    """Returns the colour (or shape) of an image as its questions and answers tell it, None where they do not.

    Args:
        questions: (question, answer) pairs about one image.
        values: all colours, or all shapes.
        item: for the error message.

    Raises:
        ValueError: the answers contradict each other.
    """
    has: set[str] = set()
    lacks: set[str] = set()
    for question, answer in questions:
        words = set(re.findall("[a-z]+", question))
        named = words.intersection(values)
        if answer in ("yes", "no"):
            # "is there not a circle?" - "no" says that there is a circle.
            affirmed = (answer == "yes") != bool(words & {"no", "not"})
            (has if affirmed else lacks).update(named)
        else:
            has.update(named)
            has.update({answer}.intersection(values))
    if not has and len(lacks) == len(values) - 1:
        has = set(values) - lacks
    if len(has) > 1 or has & lacks:
        raise ValueError(
            f"easy-vqa image {item!r}: its questions contradict each other (is {sorted(has)}, is not {sorted(lacks)}); "
            "reinstall easy-vqa 1.0"
        )
    return has.pop() if has else None


def _shapes(split: str) -> list[Row]:
    """Returns the images whose questions tell both colour and shape (92 in 100 do)."""
    rows = []
    for item, (path, questions) in _easy_vqa().items():
        if split_of(item) != split:
            continue
        colour, shape = _attribute(questions, COLOURS, item), _attribute(questions, SHAPES, item)
        if colour and shape:
            rows.append({"item": item, "image": _encoded(path.read_bytes()), "label": f"{colour} {shape}"})
    return rows


def _questions(split: str) -> list[Row]:
    """Returns questions about images: all of them in `public`, one for each image elsewhere."""
    rows = []
    for item, (path, questions) in _easy_vqa().items():
        if split_of(item) != split or not questions:
            continue
        image = _encoded(path.read_bytes())
        asked = sorted(set(questions), key=lambda pair: _unit(f"{item} {pair[0]}"))
        for question, answer in asked if split == "public" else asked[:1]:
            rows.append({"item": item, "image": image, "question": question, "answer": answer})
    return rows


def _encoded(png: bytes) -> dict[str, bytes | None]:
    """Returns a PNG file's bytes as the value of a column of `datasets.Image`."""
    return {"bytes": png, "path": None}


# --- scikit-learn: digits -------------------------------------------------------------------------


def _digits(split: str) -> list[Row]:
    """Returns handwritten digits, their 8x8 values (0 to 16) enlarged to 64x64 pixels (0 to 255).

    The enlargement is smooth: in squares of one value each, an 8x8 patch would hold a single number.
    """
    bunch = _import("sklearn.datasets", "scikit-learn").load_digits()
    pillow = _import("PIL.Image", "pillow")
    rows = []
    for number, (values, digit) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        item = f"digits/{number}"
        if split_of(item) == split:
            grey = (values * (255 / 16)).round().astype("uint8")
            picture = pillow.fromarray(grey).resize((_IMAGE_SIZE, _IMAGE_SIZE), pillow.Resampling.BICUBIC)
            file = io.BytesIO()
            picture.convert("RGB").save(file, format="PNG")
            rows.append({"item": item, "image": _encoded(file.getvalue()), "label": str(digit)})
    return rows


# --- emoji: names ---------------------------------------------------------------------------------


def _key(symbol: str) -> str:
    """Returns an emoji without what tells its variants by gender or direction apart."""
    if "\u200d" in symbol:  # a sequence joined by U+200D; female sign, male sign and right arrow are its modifiers
        symbol = re.sub("[\u200d\u2640\u2642\u27a1]", "", symbol)
    return re.sub("[\U0001f468\U0001f469]", "\U0001f9d1", symbol).replace("\ufe0f", "")


@functools.cache
def _emoji() -> dict[str, list[dict[str, str]]]:
    """Returns for each item its emoji, each a dict from language to name, less what the module says is left out."""
    package = _import("emoji", "emoji")
    package.config.load_language(list(LANGUAGES))
    members: dict[str, list[dict[str, str]]] = defaultdict(list)
    for symbol, entry in sorted(package.EMOJI_DATA.items()):
        tone = any("\U0001f3fb" <= char <= "\U0001f3ff" for char in symbol)
        flag = all("\U0001f1e6" <= char <= "\U0001f1ff" for char in symbol) or symbol[-1] >= "\U000e0000"
        family = entry["en"].startswith(":family_")
        complete = all(language in entry for language in LANGUAGES)
        if entry["status"] == package.STATUS["fully_qualified"] and complete and not (tone or flag or family):
            names = {language: entry[language].strip(":").replace("_", " ") for language in LANGUAGES}
            members[_key(symbol)].append(names)

    # Join the groups which share a name in a language: `leader` points from a group to one that it belongs to.
    leader: dict[str, str] = {}
    first: dict[tuple[str, str], str] = {}

    def root(key: str) -> str:
        while key in leader:
            key = leader[key]
        return key

    for key, group in members.items():
        for names in group:
            for language, name in names.items():
                low, high = sorted((root(key), root(first.setdefault((language, name.casefold()), key))))
                if low != high:
                    leader[high] = low
    items: dict[str, list[dict[str, str]]] = defaultdict(list)
    for key, group in members.items():
        items[f"emoji/{root(key)}"].extend(group)
    return items


def _names(split: str) -> list[Row]:
    """Returns the names in all languages, without those that two languages share."""
    languages: dict[str, set[str]] = defaultdict(set)
    for group in _emoji().values():
        for names in group:
            for language, name in names.items():
                languages[name.casefold()].add(language)
    rows = {
        (language, name.casefold()): {"item": item, "text": name, "label": language}
        for item, group in _emoji().items()
        if split_of(item) == split
        for names in group
        for language, name in names.items()
        if len(languages[name.casefold()]) == 1
    }
    return list(rows.values())


# --- CLDR: dates ----------------------------------------------------------------------------------


def _dates(split: str) -> list[Row]:
    """Returns the days of the year, each written with the month's name in full and short, in all languages."""
    dates = _import("babel.dates", "babel")
    rows: dict[str, Row] = {}
    for day in (datetime.date(2024, 1, 1) + datetime.timedelta(days) for days in range(366)):  # a leap year
        item = f"days/{day:%m-%d}"
        if split_of(item) == split:
            for language in LANGUAGES:
                for skeleton in ("MMMMd", "MMMd"):
                    text = dates.format_skeleton(skeleton, day, locale=language)
                    row = {"item": item, "text": text, "target": f"{day:%m-%d}", "language": language}
                    rows.setdefault(text.casefold(), row)
    return list(rows.values())
