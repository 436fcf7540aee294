"""The model, the data, training and testing."""

import random
from pathlib import Path

import emoji
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel

LETTERS = "abcdefghijklmnopqrstuvwxyzáäéíñóöúüß '-"
PAD, ANSWER, END = 0, 1, 2
"""After the English name comes ANSWER, after the other END."""
LANGUAGES = ("es", "de")


def Net(checkpoint: str) -> PeftModel:
    """A GPT-2 that stays as it was pretrained, with LoRA, which begins at 0."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    return get_peft_model(GPT2LMHeadModel.from_pretrained(Path(checkpoint).expanduser()), lora)


def names(language: str) -> list[tuple[str, str]]:
    """(English name, name in `language`) of emoji, in a fixed order."""
    emoji.config.load_language(["en", language])
    entries = [e for e in emoji.EMOJI_DATA.values() if {"en", language} <= e.keys() and "skin_tone" not in e["en"]]
    pairs = {tuple(entry[key].strip(":").replace("_", " ") for key in ("en", language)) for entry in entries}
    return random.Random(0).sample(sorted(pair for pair in pairs if sum(map(len, pair)) <= 40), 1000)


def numbers(text: str) -> list[int]:
    """The letters of a text as numbers."""
    return [LETTERS.index(c) + 3 for c in text.lower() if c in LETTERS]


def collate(rows: list[tuple[str, str]]) -> dict[str, Tensor]:
    """A batch as transformers takes it: English, ANSWER, the other name, END, padded; the loss counts the last two."""
    asked = [[*numbers(english), ANSWER] for english, _ in rows]
    answers = [[*numbers(other), END] for _, other in rows]
    width = max(len(a) + len(b) for a, b in zip(asked, answers, strict=True))
    ids = torch.full((len(rows), width), PAD)
    labels = torch.full((len(rows), width), -100)
    for row, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        end = len(question) + len(answer)
        ids[row, :end] = torch.tensor(question + answer)
        labels[row, len(question) : end] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def load_data(partition_id: int, num_partitions: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """The client's loaders, of one language: four fifths to train on, one to test on."""
    of = -(-num_partitions // len(LANGUAGES))
    rows = names(LANGUAGES[partition_id % len(LANGUAGES)])[partition_id // len(LANGUAGES) :: of]
    cut = len(rows) * 4 // 5
    return (
        DataLoader(rows[:cut], batch_size, shuffle=True, collate_fn=collate),
        DataLoader(rows[cut:], 64, collate_fn=collate),
    )


def train(net: nn.Module, loader: DataLoader, epochs: int, rate: float) -> float:
    """Trains; returns the mean loss of a batch, which the model computes itself."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=rate)
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
def test(net: nn.Module, loader: DataLoader) -> float:
    """Mean loss of a letter of the answers."""
    net.eval()
    loss, letters = 0.0, 0
    for batch in loader:
        count = int((batch["labels"] != -100).sum())
        loss, letters = loss + net(**batch).loss.item() * count, letters + count
    return loss / letters
