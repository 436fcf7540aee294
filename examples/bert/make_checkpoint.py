"""Pretrains a small BERT on half of the texts: python make_checkpoint.py FOLDER."""

import sys
from pathlib import Path

import torch
from bert.task import LANGUAGES, LETTERS, collate, texts
from transformers import BertConfig, BertForSequenceClassification


def main(folder: str, steps: int = 150) -> None:
    """Saves it to a folder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(LETTERS) + 2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=len(LANGUAGES),
    )
    net = BertForSequenceClassification(config)
    rows = texts()[::2]
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = collate([rows[i] for i in torch.randint(0, len(rows), (32,))])
        optimizer.zero_grad()
        net(**batch).loss.backward()
        optimizer.step()
    net.save_pretrained(Path(folder).expanduser())


if __name__ == "__main__":
    main(sys.argv[1])
