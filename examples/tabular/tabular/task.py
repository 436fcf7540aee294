"""The model, the data, training and testing."""

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, WeightedRandomSampler


class Net(nn.Sequential):
    """An MLP: [B, 30] -> [B, 2]."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))


class Records(Dataset):
    """Every `of`-th record, from the `number`-th on, as {"record", "label"}."""

    def __init__(self, number: int, of: int) -> None:
        records, labels = map(torch.tensor, load_breast_cancer(return_X_y=True))
        self.records = ((records - records.mean(0)) / records.std(0)).float()[number::of]
        self.labels = labels[number::of]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"record": self.records[row], "label": self.labels[row]}


def load_data(partition_id: int, num_partitions: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """The client's loaders: four fifths to train on, both classes as often; one to test on."""
    data = Records(partition_id, num_partitions)
    cut = len(data) * 4 // 5
    weights = 1 / torch.bincount(data.labels[:cut]).float()[data.labels[:cut]]
    sampler = WeightedRandomSampler(weights, cut)
    train, test = Subset(data, range(cut)), Subset(data, range(cut, len(data)))
    return DataLoader(train, batch_size, sampler=sampler), DataLoader(test, 64)


def train(net: nn.Module, loader: DataLoader, epochs: int, rate: float) -> float:
    """Trains; returns the mean loss of a batch."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=rate, momentum=0.9)
    net.train()
    losses = []
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(batch["record"]), batch["label"])
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
        logits = net(batch["record"])
        loss += nn.functional.cross_entropy(logits, batch["label"], reduction="sum").item()
        right += (logits.argmax(1) == batch["label"]).sum().item()
    return loss / len(loader.dataset), right / len(loader.dataset)
