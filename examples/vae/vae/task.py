"""The model, the data, training and testing."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split


class Net(nn.Module):
    """An autoencoder: [B, 64] -> (pixels [B, 64], mean [B, 8], logarithm of the variance [B, 8])."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (
            nn.Sequential(nn.Linear(64, 32), nn.ReLU()),
            nn.Sequential(nn.Linear(8, 32), nn.ReLU()),
        )
        self.mean, self.log_variance, self.pixels = nn.Linear(32, 8), nn.Linear(32, 8), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draws a latent in training; takes the mean otherwise."""
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.pixels(self.decoder(mean + noise * (log_variance / 2).exp())), mean, log_variance


def elbo(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    """The negative evidence lower bound of each image [B]."""
    pixels, mean, log_variance = output
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
    return (pixels - x).square().sum(1) + 0.1 * divergence


def load_data(partition_id: int, num_partitions: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """The client's loaders: four fifths to train on, one to test on."""
    images = torch.tensor(load_digits().data[partition_id::num_partitions]).float() / 16
    train, test = random_split(TensorDataset(images), [0.8, 0.2], torch.Generator().manual_seed(42))
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, 64)


def train(net: nn.Module, loader: DataLoader, epochs: int, rate: float) -> float:
    """Trains; returns the mean loss of a batch."""
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    net.train()
    losses = []
    for _ in range(epochs):
        for (x,) in loader:
            optimizer.zero_grad()
            loss = elbo(net(x), x).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def test(net: nn.Module, loader: DataLoader) -> float:
    """Mean loss."""
    net.eval()
    return sum(elbo(net(x), x).sum().item() for (x,) in loader) / len(loader.dataset)
