"""Pretrains a small vision transformer on digits that are turned by 90 degrees: python make_checkpoint.py FOLDER."""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification


def main(folder: str, steps: int = 150) -> None:
    """Saves it to a folder."""
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    net = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **layers))
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float().view(-1, 1, 8, 8).rot90(1, (2, 3)) / 16, torch.tensor(labels)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(0, len(y), (64,))
        optimizer.zero_grad()
        net(x[rows], labels=y[rows]).loss.backward()
        optimizer.step()
    net.save_pretrained(Path(folder).expanduser())


if __name__ == "__main__":
    main(sys.argv[1])
