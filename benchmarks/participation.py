"""`python -m benchmarks.participation [--batch B] [--steps N] [--threads T]`: one client's participation at full size.

FLAVA at the size of `facebook/flava-full` with random weights (no download), the two tasks of the paper's pattern 7 (image
classification with 100 classes, text classification with 4), made-up data, texts of 64 tokens. Prints the seconds of the
first and of a later participation in the same process, teacher and personal model included, and the peak of resident memory.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from typing import Any, cast

import torch
from transformers import FlavaConfig

from tap_flower.config import HyperParameters, ReplacementEvidence
from tap_flower.core.training import Batch
from tap_flower.data.loading import ClientData
from tap_flower.data.spec import ClientSpec, client_spec
from tap_flower.methods import tap
from tap_flower.methods.local import LocalClient, cpu_state
from tap_flower.models.backbones import from_config

TOKENS = 64


class MadeUpData:
    """Random examples of both tasks, in turns."""

    def training_batches(self, batch_size: int, seed: int, device: torch.device) -> Iterator[Batch]:
        """Endless batches."""
        random = torch.Generator().manual_seed(seed % 2**63)
        while True:
            pixels = torch.randn(batch_size, 3, 64, 64, generator=random)
            classes = torch.randint(100, (batch_size,), generator=random)
            yield Batch("cifar100", {"domain": "objects", "image": pixels.to(device)}, classes.to(device))
            ids = torch.randint(1000, 30_000, (batch_size, TOKENS), generator=random)
            topics = torch.randint(4, (batch_size,), generator=random)
            yield Batch("news", {"domain": "news", "input_ids": ids.to(device)}, topics.to(device))


def client(steps: int, batch_size: int) -> LocalClient:
    """A client of pattern 7."""
    source = {"format": "hub", "name": "none/none", "split": "train"}
    shared: dict[str, Any] = {"train": source, "test": source}
    spec: ClientSpec = client_spec(
        {
            "name": "pattern-7",
            "backbone": "facebook/flava-full",
            "tasks": [
                {
                    **shared,
                    "name": "cifar100",
                    "kind": "image_classification",
                    "modalities": ["image"],
                    "domain": "objects",
                    "classes": 100,
                    "columns": {"image": "img", "label": "fine_label"},
                },
                {
                    **shared,
                    "name": "news",
                    "kind": "text_classification",
                    "modalities": ["text"],
                    "domain": "news",
                    "classes": 4,
                    "columns": {"text": "text", "label": "label"},
                },
            ],
        }
    )
    settings = HyperParameters()
    settings.train.steps, settings.train.batch_size = steps, batch_size
    settings.replacement.evidence = ReplacementEvidence.training
    return LocalClient(spec, cast(ClientData, MadeUpData()), from_config(FlavaConfig(), layers=1), settings)


def main() -> None:
    """Prints a row for each participation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4, help="examples in a batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    local = client(options.steps, options.batch)
    received = cpu_state(local.model())
    print(f"load: {time.perf_counter() - began:.1f} s")
    personal = None
    for number in (1, 2):
        began = time.perf_counter()
        result = tap.participate(local, number, received, personal)
        personal, received = result.personal, result.server_copy
        print(f"participation {number}: {time.perf_counter() - began:.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    sent = sum(tensor.nbytes for tensor in received.values())
    print(f"peak memory {peak / 1e9:.2f} GB; {sent / 1e6:.2f} MB of tensors in each direction")


if __name__ == "__main__":
    main()
