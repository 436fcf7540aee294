"""Digits that scikit-learn carries, and names that the package emoji carries, cut into shares."""

import random
from functools import cache

import emoji
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, TensorDataset, random_split

LANGUAGES = ("en", "de", "es", "fr")
ALPHABET = " abcdefghijklmnopqrstuvwxyzàáâãäçèéêëìíîïñòóôõöùúûüß'-"
LENGTH = 24


def encoded(text: str) -> list[int]:
    """Characters of a text as numbers from 1 on, 0 after its end."""
    known = [ALPHABET.index(c) + 1 for c in text.lower() if c in ALPHABET][:LENGTH]
    return known + [0] * (LENGTH - len(known))


@cache
def digits() -> Dataset:
    """Images [1, 8, 8] between 0 and 1, and their digit."""
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels))


@cache
def names() -> Dataset:
    """Names of emoji [LENGTH], and their language."""
    emoji.config.load_language(list(LANGUAGES))
    found = {
        (entry[language].strip(":").replace("_", " "), number)
        for entry in emoji.EMOJI_DATA.values()
        for number, language in enumerate(LANGUAGES)
        if language in entry and "skin_tone" not in entry["en"] and "flag" not in entry["en"]
    }
    rows = random.Random(0).sample(sorted(found), 2400)
    return TensorDataset(torch.tensor([encoded(name) for name, _ in rows]), torch.tensor([label for _, label in rows]))


def share(dataset: Dataset, number: int, of: int) -> tuple[Dataset, Dataset]:
    """The examples of one client: (to train on, to test on)."""
    rows = range(number, len(dataset), of)
    mine = torch.utils.data.Subset(dataset, rows)
    return tuple(random_split(mine, [0.8, 0.2], torch.Generator().manual_seed(number)))
