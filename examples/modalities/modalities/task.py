"""The model, the data, training and testing."""

import random
from pathlib import Path

import emoji
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

WIDTH, LENGTH = 32, 24
LETTERS = "abcdefghijklmnopqrstuvwxyzáäéíñóöúüß '-"
LANGUAGES = ("en", "es", "de")
MODALITIES = ("image", "text")
CLASSES = {"image": 10, "text": len(LANGUAGES)}


def modality_of(partition_id: int) -> str:
    """Clients have images and texts in turn."""
    return MODALITIES[partition_id % len(MODALITIES)]


def Trunk() -> nn.Module:
    """What all clients share, whatever their modality: tokens [B, T, WIDTH] -> [B, T, WIDTH]."""
    layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)


def pretrained(checkpoint: str) -> nn.Module:
    """The trunk with the values of its checkpoint."""
    trunk = Trunk()
    trunk.load_state_dict(load_file(Path(checkpoint).expanduser() / "trunk.safetensors"))
    return trunk


class Encoder(nn.Module):
    """A modality's way into the trunk: [B, T, ...] -> [B, T, WIDTH]."""

    def __init__(self, tokens: nn.Module, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = tokens, nn.Parameter(0.1 * torch.randn(length, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """A vector for each patch or letter, and one for its place."""
        return self.tokens(x) + self.positions


class Net(nn.Module):
    """The trunk between the encoder and the head of one modality, which bear its name."""

    def __init__(self, modality: str, trunk: nn.Module) -> None:
        super().__init__()
        image, self.modality = modality == "image", modality
        encoder = Encoder(nn.Linear(4, WIDTH), 16) if image else Encoder(nn.Embedding(len(LETTERS) + 1, WIDTH), LENGTH)
        self.encoders = nn.ModuleDict({modality: encoder})
        self.trunk = trunk
        self.heads = nn.ModuleDict({modality: nn.Linear(WIDTH, CLASSES[modality])})

    def forward(self, x: Tensor) -> Tensor:
        """Images as patches [B, 16, 4], or letters [B, LENGTH], -> logits [B, C]."""
        return self.heads[self.modality](self.trunk(self.encoders[self.modality](x)).mean(1))


def patches(images: Tensor) -> Tensor:
    """Images [B, 8, 8] as patches of 2 by 2 pixels [B, 16, 4]."""
    return images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 16, 4)


def texts() -> list[tuple[str, int]]:
    """Names of emoji and the number of their language, in a fixed order."""
    emoji.config.load_language(list(LANGUAGES))
    entries = [entry for entry in emoji.EMOJI_DATA.values() if all(language in entry for language in LANGUAGES)]
    found = {
        (entry[language].strip(":").replace("_", " "), n) for entry in entries for n, language in enumerate(LANGUAGES)
    }
    return random.Random(0).sample(sorted(found), 1800)


def letters(text: str) -> list[int]:
    """The letters of a text as numbers, and 0 after its end."""
    known = [LETTERS.index(c) + 1 for c in text.lower() if c in LETTERS][:LENGTH]
    return known + [0] * (LENGTH - len(known))


def load_data(partition_id: int, num_partitions: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """The client's loaders, of one modality: four fifths to train on, one to test on."""
    if modality_of(partition_id) == "image":
        images, labels = load_digits(return_X_y=True)
        x, y = patches(torch.tensor(images).float().view(-1, 8, 8) / 16), torch.tensor(labels)
    else:
        rows = texts()
        x, y = torch.tensor([letters(text) for text, _ in rows]), torch.tensor([label for _, label in rows])
    mine = slice(partition_id // len(MODALITIES), None, -(-num_partitions // len(MODALITIES)))
    train, test = random_split(TensorDataset(x[mine], y[mine]), [0.8, 0.2], torch.Generator().manual_seed(42))
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, 64)


def train(net: nn.Module, loader: DataLoader, epochs: int, rate: float) -> float:
    """Trains; returns the mean loss of a batch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    net.train()
    losses = []
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def test(net: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Mean loss and accuracy."""
    net.eval()
    loss, right = 0.0, 0
    for x, y in loader:
        logits = net(x)
        loss += nn.functional.cross_entropy(logits, y, reduction="sum").item()
        right += (logits.argmax(1) == y).sum().item()
    return loss / len(loader.dataset), right / len(loader.dataset)
