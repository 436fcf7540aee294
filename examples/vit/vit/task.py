"""The model, the data, training and testing."""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler
from transformers import ViTForImageClassification


def Net(checkpoint: str) -> nn.Module:
    """A vision transformer: [B, 1, 8, 8] -> an output with `logits` [B, 10]."""
    return ViTForImageClassification.from_pretrained(Path(checkpoint).expanduser())


class Digits(Dataset):
    """Every `of`-th of scikit-learn's digits, from the `number`-th on, as {"image", "label"}."""

    def __init__(self, number: int, of: int) -> None:
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images[number::of]).float().view(-1, 1, 8, 8) / 16
        self.labels = torch.tensor(labels[number::of])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"image": self.images[row], "label": self.labels[row]}


def load_data(partition_id: int, num_partitions: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """The client's loaders, over one data set: four fifths of its rows to train on, one to test on."""
    data = Digits(partition_id, num_partitions)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(42)).tolist()
    cut = len(data) * 4 // 5
    train, test = SubsetRandomSampler(order[:cut]), SubsetRandomSampler(order[cut:])
    return DataLoader(data, batch_size, sampler=train, drop_last=True), DataLoader(data, 64, sampler=test)


def train(net: nn.Module, loader: DataLoader, epochs: int, rate: float) -> float:
    """Trains; returns the mean loss of a batch."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=rate, momentum=0.9)
    net.train()
    losses = []
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(batch["image"]).logits, batch["label"])
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
        logits = net(batch["image"]).logits
        loss += nn.functional.cross_entropy(logits, batch["label"], reduction="sum").item()
        right += (logits.argmax(1) == batch["label"]).sum().item()
    return loss / len(loader.sampler), right / len(loader.sampler)
