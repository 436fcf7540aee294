"""Pretrains a small GPT-2 to copy English names: python make_checkpoint.py FOLDER."""

import sys
from pathlib import Path

import torch
from lora.task import ANSWER, END, LETTERS, PAD, collate, names
from transformers import GPT2Config, GPT2LMHeadModel


def main(folder: str, steps: int = 200) -> None:
    """Saves it to a folder."""
    torch.manual_seed(0)
    special = {"pad_token_id": PAD, "bos_token_id": ANSWER, "eos_token_id": END}
    size = {"vocab_size": len(LETTERS) + 3, "n_positions": 80, "n_embd": 64, "n_layer": 2, "n_head": 4}
    net = GPT2LMHeadModel(GPT2Config(**size, **special))
    rows = [(english, english) for english, _ in names("es")]
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = collate([rows[i] for i in torch.randint(0, len(rows), (32,))])
        optimizer.zero_grad()
        net(**batch).loss.backward()
        optimizer.step()
    net.save_pretrained(Path(folder).expanduser())


if __name__ == "__main__":
    main(sys.argv[1])
