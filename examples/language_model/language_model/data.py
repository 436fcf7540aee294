"""Names of emoji in three languages, from the package emoji: a prompt in English, an answer in another language."""

import random

import emoji
import torch
from torch.utils.data import TensorDataset

from tap_flower.core.tasks import IGNORE

LETTERS = "abcdefghijklmnopqrstuvwxyzáäéíñóöúüß '-"
PAD, ANSWER, END = 0, 1, 2
"""After the prompt comes ANSWER, after the answer END."""
ALPHABET = len(LETTERS) + 3
LENGTH = 48


def ids(text: str) -> list[int]:
    """The characters of a text as numbers."""
    return [LETTERS.index(c) + 3 for c in text.lower() if c in LETTERS]


def text(numbers: list[int]) -> str:
    """What `ids` takes back, up to the end."""
    kept = numbers[: numbers.index(END)] if END in numbers else numbers
    return "".join(LETTERS[n - 3] for n in kept if n >= 3)


def names(language: str) -> list[tuple[str, str]]:
    """(English name, name in `language`) of emoji, in an order of their own."""
    emoji.config.load_language(["en", language])
    found = {
        tuple(entry[key].strip(":").replace("_", " ") for key in ("en", language))
        for entry in emoji.EMOJI_DATA.values()
        if language in entry and "skin_tone" not in entry["en"]
    }
    return random.Random(language).sample(sorted(found), len(found))


def examples(pairs: list[tuple[str, str]]) -> TensorDataset:
    """Inputs [N, LENGTH - 1], and as targets the next character, IGNORE in the prompt and after the end.

    What is longer than LENGTH is left out.
    """
    inputs, targets = [], []
    for english, other in pairs:
        prompt = [*ids(english), ANSWER]
        row = [*prompt, *ids(other), END]
        if len(row) > LENGTH:
            continue
        row += [PAD] * (LENGTH - len(row))
        inputs.append(row[:-1])
        targets.append([n if at >= len(prompt) - 1 and n != PAD else IGNORE for at, n in enumerate(row[1:])])
    return TensorDataset(torch.tensor(inputs), torch.tensor(targets))
