"""The model, the data, training and testing."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, random_split


class Net(nn.Module):
    """A small CNN: [B, 1, 8, 8] -> [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(32 * 2 * 2, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the digits."""
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


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
    """The client's loaders: four fifths to train on, one to test on."""
    train, test = random_split(Digits(partition_id, num_partitions), [0.8, 0.2], torch.Generator().manual_seed(42))
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, batch_size)


def train(net: Net, loader: DataLoader, epochs: int, rate: float) -> float:
    """Trains; returns the mean loss of a batch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    losses = []
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def test(net: Net, loader: DataLoader) -> float:
    """The accuracy."""
    right = sum((net(batch["image"]).argmax(1) == batch["label"]).sum().item() for batch in loader)
    return right / len(loader.dataset)
