"""`python -m benchmarks.mean_image [--seed S]`: the error of predicting the mean training image, for the demo's clients.

What the `mse` of image generation must be compared with: it is on normalised pixels of the same test rows.
"""

from __future__ import annotations

import argparse

import torch

from tap_flower.config import client_specs, load_config
from tap_flower.core.tasks import IMAGE_GENERATION
from tap_flower.data.loading import load_client_data
from tap_flower.data.text import load_tokenizer
from tap_flower.hub import locate


def main() -> None:
    """Prints a row for each client with an image generation task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=41, help="of the run (default: %(default)s)")
    seed = parser.parse_args().seed
    config, cpu = load_config("demo"), torch.device("cpu")
    for spec in client_specs(config):
        data = load_client_data(spec, load_tokenizer(locate(spec.backbone)), config.model.text_length, seed)
        for task in spec.tasks:
            if task.kind == IMAGE_GENERATION.name:
                train, test = (data.splits[split][task.name][0] for split in ("train", "test"))
                mean = train.batch(range(len(train)), cpu).target.mean(0, keepdim=True)
                images = test.batch(range(len(test)), cpu).target
                error = IMAGE_GENERATION.losses(mean.expand_as(images), images).mean()
                print(f"{spec.name} {task.name}: {error.item():.3f}")


if __name__ == "__main__":
    main()
