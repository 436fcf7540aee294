"""One module with two ways in: a CNN for images, a GRU for texts, and a trunk that both share."""

import torch
from torch import Tensor, nn

WIDTH = 64


class Images(nn.Module):
    """[B, 1, 8, 8] -> [B, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.out = nn.Linear(32 * 2 * 2, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of the images."""
        x = torch.max_pool2d(torch.relu(self.near(pixels)), 2)
        x = torch.max_pool2d(torch.relu(self.far(x)), 2)
        return self.out(x.flatten(1))


class Texts(nn.Module):
    """Characters [B, T] (0 is padding) -> [B, WIDTH]."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.gru = nn.GRU(32, WIDTH, batch_first=True)

    def forward(self, characters: Tensor) -> Tensor:
        """Features of the texts: the mean over their characters."""
        states, _ = self.gru(self.embedding(characters))
        written = (characters != 0).unsqueeze(-1)
        return (states * written).sum(1) / written.sum(1)


class Net(nn.Module):
    """Only what the client's tasks need.

    Args:
        classes: task name (`digits`, `languages`) -> number of its classes.
        characters: size of the alphabet.
    """

    def __init__(self, classes: dict[str, int], characters: int) -> None:
        super().__init__()
        if "digits" in classes:
            self.images = Images()
        if "languages" in classes:
            self.texts = Texts(characters)
        self.trunk = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.heads = nn.ModuleDict({task: nn.Linear(WIDTH, size) for task, size in classes.items()})

    def see(self, pixels: Tensor) -> Tensor:
        """Logits of the digit in each image."""
        return self.heads["digits"](self.trunk(self.images(pixels)))

    def read(self, characters: Tensor) -> Tensor:
        """Logits of the language of each text."""
        return self.heads["languages"](self.trunk(self.texts(characters)))
