"""The model, the data, training and testing."""

import random
from pathlib import Path

import emoji
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification

LETTERS = "abcdefghijklmnopqrstuvwxyzáäéíñóöúüß '-"
LANGUAGES = ("en", "es", "de")


def Net(checkpoint: str) -> nn.Module:
    """A BERT with a head for three languages."""
    return BertForSequenceClassification.from_pretrained(Path(checkpoint).expanduser())


def texts() -> list[tuple[str, int]]:
    """Names of emoji and the number of their language, in a fixed order."""
    emoji.config.load_language(list(LANGUAGES))
    entries = [entry for entry in emoji.EMOJI_DATA.values() if all(language in entry for language in LANGUAGES)]
    found = sorted(
        {(entry[language].strip(":").replace("_", " "), n) for entry in entries for n, language in enumerate(LANGUAGES)}
    )
    return random.Random(0).sample(found, 1200)


def collate(rows: list[tuple[str, int]]) -> dict[str, Tensor]:
    """A batch of letters' numbers, padded with 0, after a 1 that stands for the whole text."""
    ids = [[1, *[LETTERS.index(c) + 2 for c in text.lower() if c in LETTERS][:31]] for text, _ in rows]
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    return {
        "input_ids": padded,
        "attention_mask": (padded > 0).long(),
        "labels": torch.tensor([label for _, label in rows]),
    }


def load_data(partition_id: int, num_partitions: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """The client's loaders: four fifths to train on, one to test on."""
    rows = texts()[partition_id::num_partitions]
    cut = len(rows) * 4 // 5
    return (
        DataLoader(rows[:cut], batch_size, shuffle=True, collate_fn=collate),
        DataLoader(rows[cut:], 64, collate_fn=collate),
    )


def train(net: nn.Module, loader: DataLoader, epochs: int, rate: float) -> float:
    """Trains; returns the mean loss of a batch, which the model computes itself."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    net.train()
    losses = []
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = net(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def test(net: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Mean loss and accuracy."""
    net.eval()
    loss, right = 0.0, 0
    for batch in loader:
        output = net(**batch)
        loss += output.loss.item() * len(batch["labels"])
        right += (output.logits.argmax(1) == batch["labels"]).sum().item()
    return loss / len(loader.dataset), right / len(loader.dataset)
