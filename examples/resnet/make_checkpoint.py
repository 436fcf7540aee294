"""Pretrains a small ResNet on digits that are turned by 90 degrees: python make_checkpoint.py FOLDER."""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification


def main(folder: str, steps: int = 150) -> None:
    """Saves it to a folder."""
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10
    )
    net = ResNetForImageClassification(config)
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
