"""What is known of the presets' data sets and checkpoints on the hub, and how they are fetched."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """Facts of a repository on the hub, as its own pages give them.

    Attributes:
        licence: as its card names it.
        megabytes: size of its files (for a checkpoint, of the weights); None where it is not known.
    """

    licence: str
    megabytes: int | None = None


CATALOGUE = {
    "facebook/flava-full": Facts("BSD-3-Clause", 1220),
    "dandelin/vilt-b32-mlm": Facts("Apache-2.0", 543),
    "zh-plus/tiny-imagenet": Facts("none stated", 161),
    "uoft-cs/cifar100": Facts("unknown"),
    "sh0416/ag_news": Facts("none stated", 36),
    "ilee0022/Caltech-256": Facts("none stated", 1148),
    "merve/vqav2-small": Facts("none stated", 3377),
    "cais/mmlu": Facts("MIT"),
    "allenai/common_gen": Facts("MIT"),
    "zalando-datasets/fashion_mnist": Facts("MIT"),
}


def fetch_command(name: str, revision: str | None, *, is_model: bool = False) -> str:
    """The command that fetches a data set or a checkpoint from the hub."""
    kind = "" if is_model else " --repo-type dataset"
    return f"hf download {name}{kind}" + (f" --revision {revision}" if revision else "")
