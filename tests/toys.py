"""Small clients for tests: modules of some hundred values, data drawn from a seed; a participation takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from tap_flower import IMAGE_GENERATION, TEXT_CLASSIFICATION, TEXT_GENERATION, Client, TapClientApp, Task, TaskKind
from tap_flower.core.seeds import named_seed
from tap_flower.core.tasks import IGNORE

REGRESSION = TaskKind.of(
    "regression",
    lambda output, target: (output - target).square().mean(-1),
    lambda student, teacher, target, temperature: (student - teacher).square().mean(-1),
)
INPUTS = {
    "digits": ("image",),
    "mood": ("words",),
    "languages": ("words",),
    "shape_images": ("image",),
    "answers": ("image", "words"),
    "translation": ("words",),
}
"""Task -> modalities: an image is 4 numbers, words are 5 times 3."""
OUTPUTS = {
    "digits": (3,),
    "mood": (2,),
    "languages": (3,),
    "shape_images": (3, 2, 2),
    "answers": (2, 4),
    "translation": (2, 4),
}
"""Task -> shape of its output: of logits, of numbers, of an image, of two tokens' logits."""


class Net(nn.Module):
    """An encoder for each modality of its tasks, one trunk, a head for each task.

    It shares with other nets what has the same name.
    """

    def __init__(self, *tasks: str, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        modalities = {modality for task in tasks for modality in INPUTS[task]}
        self.image = nn.Linear(4, width) if "image" in modalities else None
        self.words = nn.GRU(3, width, batch_first=True) if "words" in modalities else None
        self.trunk = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Dropout(dropout))
        self.heads = nn.ModuleDict({task: nn.Linear(width, torch.Size(OUTPUTS[task]).numel()) for task in tasks})

    def see(self, pixels: Tensor) -> Tensor:
        return self.run("digits", [pixels])

    def read(self, words: Tensor) -> Tensor:
        return self.run("mood", [words])

    def run(self, task: str, inputs: Sequence[Tensor]) -> Tensor:
        """The output of a task: [B, …] for its modalities in the order of `INPUTS`."""
        encoders = {"image": self._seen, "words": self._read}
        latents = [encoders[modality](x) for modality, x in zip(INPUTS[task], inputs, strict=True)]
        return self.heads[task](self.trunk(torch.stack(latents).sum(0))).unflatten(1, OUTPUTS[task])

    def _seen(self, pixels: Tensor) -> Tensor:
        assert self.image is not None
        return torch.relu(self.image(pixels))

    def _read(self, words: Tensor) -> Tensor:
        assert self.words is not None
        return self.words(words)[0][:, -1]


class LowRank(nn.Module):
    """A frozen layer with LoRA."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.A, self.B = nn.Linear(frozen.in_features, 2, bias=False), nn.Linear(2, frozen.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.B(self.A(x))


def random_pixels(count: int, seed: int) -> Tensor:
    return torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))


def random_words(count: int, seed: int) -> Tensor:
    return torch.rand(count, 5, 3, generator=torch.Generator().manual_seed(seed))


def pixels(count: int, seed: int) -> Dataset[Any]:
    """The class is the largest of the first three numbers."""
    x = random_pixels(count, seed)
    return TensorDataset(x, x[:, :3].argmax(1))


def words(count: int, seed: int) -> Dataset[Any]:
    """The target is the sum over the words, of the first two numbers each."""
    x = random_words(count, seed)
    return TensorDataset(x, x.sum(1)[:, :2])


def languages(count: int, seed: int) -> Dataset[Any]:
    """The class is the largest of the three numbers, summed over the words."""
    x = random_words(count, seed)
    return TensorDataset(x, x.sum(1).argmax(1))


def shape_images(count: int, seed: int) -> Dataset[Any]:
    """The target is the image itself, 2 by 2, in three channels."""
    x = random_pixels(count, seed)
    return TensorDataset(x, x.view(-1, 1, 2, 2).repeat(1, 3, 1, 1))


def answers(count: int, seed: int) -> Dataset[Any]:
    """The tokens are the largest number of the image and, in every other text, that of the first word."""
    image, x = random_pixels(count, seed), random_words(count, seed + 1)
    tokens = torch.stack([image.argmax(1), x[:, 0].argmax(1)], 1)
    tokens[::2, 1] = IGNORE
    return TensorDataset(image, x, tokens)


def translation(count: int, seed: int) -> Dataset[Any]:
    """The tokens are the largest numbers of the first word and of the last."""
    x = random_words(count, seed)
    return TensorDataset(x, torch.stack([x[:, 0].argmax(1), x[:, -1].argmax(1)], 1))


DATA: Mapping[str, tuple[TaskKind, Callable[[int, int], Dataset[Any]]]] = {
    "languages": (TEXT_CLASSIFICATION, languages),
    "shape_images": (IMAGE_GENERATION, shape_images),
    "answers": (TEXT_GENERATION, answers),
    "translation": (TEXT_GENERATION, translation),
}
"""Task -> its kind, and (examples, seed) -> data set."""


def task(name: str, client: str, examples: int) -> Task:
    """A task of a client, with 6 validation and 10 test examples."""
    kind, make = DATA[name]
    counts = {"train": examples, "validation": 6, "test": 10}
    splits = {split: make(count, named_seed(0, client, name, split)) for split, count in counts.items()}
    return Task(
        name,
        kind,
        INPUTS[name],
        splits["train"],
        splits["test"],
        forward=lambda net, batch: net.run(name, batch[:-1]),
        target=lambda batch: batch[-1],
        validation=splits["validation"],
    )


@dataclass(frozen=True)
class Toy:
    """A client by its name and the training examples of its tasks.

    Its components are named as those of tap-flower's own models: `encoder/…`, `fusion/…`, `head/…`.
    """

    name: str
    tasks: Mapping[str, int]

    def net(self) -> Net:
        return Net(*self.tasks, dropout=0.1)

    def client(self, state_dir: Path) -> Client:
        modalities = {modality for name in self.tasks for modality in INPUTS[name]}
        components = {
            **{f"encoder/{modality}": f"{modality}.*" for modality in sorted(modalities)},
            "fusion/mix": "trunk.0.*",
            "fusion/norm": "trunk.1.*",
            **{f"head/{name}": f"heads.{name}.*" for name in self.tasks},
        }
        tasks = [task(name, self.name, examples) for name, examples in self.tasks.items()]
        return Client(self.name, self.net, tasks, components, state_dir)


class LowRankToy(Toy):
    """A toy whose trunk has LoRA."""

    def net(self) -> Net:
        net = super().net()
        net.trunk[0] = LowRank(net.trunk[0])
        return net


TOYS = [
    Toy("ann", {"languages": 16}),
    Toy("bob", {"languages": 12, "shape_images": 8}),
    Toy("cleo", {"answers": 8}),
    Toy("dan", {"translation": 10}),
]
"""Two share a task, one has two, one reads two modalities at once, one has a task alone; all share the fusion."""


def toy_app(toys: Sequence[Toy], state_dir: Path) -> ClientApp:
    """The ClientApp of nodes that find their client by `partition-id`."""

    app = TapClientApp()

    @app.client()
    def make(context: Context) -> Client:
        return toys[int(context.node_config["partition-id"])].client(state_dir)

    return app
