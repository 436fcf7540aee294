"""Images a second of the loader: decoded by threads, pinned, copied to the GPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.part import Asked, SkippedError, absent
from benchmarks.measure import Row, once
from tap_flower.data.batching import Drawn, read_ahead
from tap_flower.data.examples import Examples

NEEDS = {"datasets": "datasets", "PIL": "pillow"}
"""Module -> package."""
SIDES = {"base": (256, 1000), "tiny": (64,)}
"""Pixels, of the files."""
IMAGES = {"base": 480, "tiny": 8}
BATCH = {"base": 32, "tiny": 4}


def loader_rows(asked: Asked) -> Iterator[Row]:
    """Images a second by the size of the files and the number of workers: the first epoch decodes, later ones do not.

    Raises:
        SkippedError: what decodes images is not installed.
    """
    if missing := absent(NEEDS):
        raise SkippedError(f"not installed: {', '.join(missing)}")
    from benchmarks.decoding import FORM, examples_of, forget_images, write_pictures

    cores, count = len(os.sched_getaffinity(0)), IMAGES[asked.size]
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES[asked.size]:
            paths = write_pictures(Path(folder), side)
            for workers in sorted({0, min(4, cores), cores}):
                examples, order = examples_of(paths, count, workers, BATCH[asked.size], FORM)
                forget_images()
                epoch = partial(_epoch, examples, order, workers, asked.device)
                first, later = once(epoch, asked.device), once(epoch, asked.device)
                yield {"side": side, "workers": workers, "images/s": count / first, "later images/s": count / later}


def _epoch(examples: Examples, order: Sequence[Drawn], workers: int, device: torch.device) -> None:
    total = torch.zeros((), device=device)
    for _, items in read_ahead([examples], order, workers):
        batch = examples.to_batch(examples.collate(items), device)
        total += batch.inputs["image"].sum()  # something reads it there
