"""A small mirror of the paper's eight data sets: real column names, types and label conventions, generated content."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Features, Value
from PIL import Image

WORDS = [
    "the",
    "red",
    "dog",
    "runs",
    "over",
    "green",
    "hill",
    "court",
    "doctor",
    "asks",
    "why",
    "nobody",
    "plays",
    "music",
]
STRING, IMAGE, INTEGER = Value("string"), datasets.Image(), Value("int64")
ROWS = 36
"""Rows that the groups share of each data set."""
TEST_ROWS = 5
MMLU = ("professional_law", "professional_medicine", "moral_scenarios")
FEATURES = {
    "zh-plus/tiny-imagenet": Features(image=IMAGE, label=ClassLabel(names=[f"n{i:08d}" for i in range(200)])),
    "uoft-cs/cifar100": Features(
        img=IMAGE,
        fine_label=ClassLabel(names=[f"fine {i}" for i in range(100)]),
        coarse_label=ClassLabel(names=[f"coarse {i}" for i in range(20)]),
    ),
    "sh0416/ag_news": Features(label=INTEGER, title=STRING, description=STRING),
    "ilee0022/Caltech-256": Features(image=IMAGE, label=INTEGER, text=STRING),
    "merve/vqav2-small": Features(multiple_choice_answer=STRING, question=STRING, image=IMAGE),
    "cais/mmlu": Features(
        question=STRING, subject=STRING, choices=datasets.List(STRING), answer=ClassLabel(names=["A", "B", "C", "D"])
    ),
    "allenai/common_gen": Features(concept_set_idx=Value("int32"), concepts=datasets.List(STRING), target=STRING),
    "zalando-datasets/fashion_mnist": Features(
        image=IMAGE, label=ClassLabel(names=[f"garment {i}" for i in range(10)])
    ),
}
SPLITS = {
    "zh-plus/tiny-imagenet": {"train": ROWS, "valid": TEST_ROWS},
    "uoft-cs/cifar100": {"train": ROWS, "test": TEST_ROWS},
    "sh0416/ag_news": {"train": ROWS, "test": TEST_ROWS},
    "ilee0022/Caltech-256": {"train": ROWS, "test": TEST_ROWS},
    "merve/vqav2-small": {"validation": ROWS + TEST_ROWS},
    "cais/mmlu": {"test": ROWS, "validation": TEST_ROWS},
    "allenai/common_gen": {"train": ROWS, "validation": TEST_ROWS},
    "zalando-datasets/fashion_mnist": {"train": ROWS, "test": TEST_ROWS},
}
IMAGE_SIZES = {"zh-plus/tiny-imagenet": 64, "uoft-cs/cifar100": 32, "zalando-datasets/fashion_mnist": 28}
KEYS = (
    "tiny_imagenet",
    "ag_news",
    "caltech_256",
    "vqa",
    "law",
    "medicine",
    "moral",
    "cifar100",
    "common_gen",
    "fashion_mnist",
)


def write_mirror(root: Path) -> None:
    """Writes the eight data sets as `ROOT/OWNER/NAME[/CONFIG]/SPLIT-00000-of-00001.parquet`."""
    for name in FEATURES:
        for config in MMLU if name == "cais/mmlu" else ("",):
            for split in SPLITS[name]:
                folder = root / name / config
                folder.mkdir(parents=True, exist_ok=True)
                table(name, split, config).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def table(name: str, split: str, config: str = "") -> datasets.Dataset:
    """One split of one data set; the same rows at each call."""
    random_numbers = random.Random(f"{name} {config} {split}")
    rows = [row(name, config, number, random_numbers) for number in range(SPLITS[name][split])]
    return datasets.Dataset.from_list(rows, features=FEATURES[name])


def row(name: str, config: str, number: int, numbers: random.Random) -> dict[str, Any]:
    def words(count: int) -> str:
        return " ".join(numbers.choices(WORDS, k=count))

    grey = name == "zalando-datasets/fashion_mnist"
    size = IMAGE_SIZES.get(name, 90)  # photographs are of any size; ours are wider than high
    shape = (size, size) if grey else (size, size if name in IMAGE_SIZES else size + 30, 3)
    image = Image.fromarray(np.frombuffer(numbers.randbytes(int(np.prod(shape))), dtype=np.uint8).reshape(shape))
    return {
        "zh-plus/tiny-imagenet": {"image": image, "label": numbers.randrange(200)},
        "uoft-cs/cifar100": {"img": image, "fine_label": numbers.randrange(100), "coarse_label": numbers.randrange(20)},
        "sh0416/ag_news": {"label": number % 4 + 1, "title": words(4), "description": words(9)},
        "ilee0022/Caltech-256": {"image": image, "label": numbers.randrange(257), "text": words(1)},
        "merve/vqav2-small": {"multiple_choice_answer": words(1), "question": words(5) + "?", "image": image},
        "cais/mmlu": {
            "question": words(8), "subject": config, "choices": [words(2) for _ in "ABCD"], "answer": number % 4,
        },
        "allenai/common_gen": {"concept_set_idx": number, "concepts": words(3).split(), "target": words(7)},
        "zalando-datasets/fashion_mnist": {"image": image, "label": numbers.randrange(10)},
    }[name]  # fmt: skip
