"""Digits of scikit-learn as pictures, and names of the package emoji as rows of characters."""

from functools import cache

import emoji
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

from backbones.model import IMAGE, LENGTH

LANGUAGES = ("en", "de", "es", "fr")
LETTERS = " abcdefghijklmnopqrstuvwxyzàáâäçèéêëíîïñóôöùúûüß'-"


@cache
def digits() -> Dataset:
    """Pictures [3, IMAGE, IMAGE] around 0, and their digit."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images).float().view(-1, 1, 8, 8) / 8 - 1
    return TensorDataset(F.interpolate(pixels, size=(IMAGE, IMAGE)).expand(-1, 3, -1, -1), torch.tensor(labels))


@cache
def names() -> Dataset:
    """Characters [LENGTH] (0 is padding) of names, and their language."""
    emoji.config.load_language(list(LANGUAGES))
    rows, labels = [], []
    for symbol in sorted(emoji.EMOJI_DATA):
        entry = emoji.EMOJI_DATA[symbol]
        if "skin_tone" in entry["en"]:
            continue
        for label, language in enumerate(LANGUAGES):
            known = [LETTERS.index(c) + 1 for c in entry.get(language, "").lower() if c in LETTERS][:LENGTH]
            if known:
                rows.append(known + [0] * (LENGTH - len(known)))
                labels.append(label)
    return TensorDataset(torch.tensor(rows), torch.tensor(labels))


def share(dataset: Dataset, number: int, of: int) -> tuple[Dataset, Dataset]:
    """The examples of one client: (to train on, to test on)."""
    mine = range(number, len(dataset), of)
    return Subset(dataset, [row for at, row in enumerate(mine) if at % 5]), Subset(dataset, mine[::5])
