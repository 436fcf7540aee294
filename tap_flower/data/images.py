"""Images of a data set: decoded when they are first used, resized, normalised."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import torch
from cachetools import LRUCache
from PIL import Image, ImageOps
from torch import Tensor

from tap_flower.core.tasks import IMAGE_STD
from tap_flower.data.sources import OPEN, RowError, open_source
from tap_flower.data.spec import Source

IMAGE_SIZE = 64
"""Side of the images that clients hold, in pixels."""
IMAGE_MEAN = (0.5071, 0.4865, 0.4409)
"""Mean of each channel, of pixels between 0 and 1."""
DECODED_BYTES = 1 << 30
"""Size limit of the decoded images that a process keeps: 87,000, more than twice those of the paper's largest client."""


def open_image(path: Path) -> Image.Image:
    """The image of a file, turned as its EXIF data say: as `datasets` decodes those that lie in a data set."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image)


def pixels_of(image: Image.Image) -> Tensor:
    """What clients hold of an image: [3, 64, 64] uint8, RGB."""
    image = image.convert("RGB")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels [B, 3, H, W] -> float32, mean 0 and deviation 1 by channel. The one place that normalises."""
    mean, std = _mean_and_std(pixels.device)
    return (pixels.float() / 255 - mean) / std


def denormalise(images: Tensor) -> Tensor:
    """Normalised pixels [B, 3, H, W] -> the nearest uint8 pixels: the way back from `normalise`."""
    mean, std = _mean_and_std(images.device)
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(IMAGE_MEAN, device=device).view(1, 3, 1, 1),
        torch.tensor(IMAGE_STD, device=device).view(1, 3, 1, 1),
    )


class LazyImages:
    """The images of a data set as uint8 pixels, each decoded when it is used, and then kept (12 kB each).

    All data sets of a process share `DECODED_BYTES`; beyond them, the images that were not used for longest are forgotten.

    Args:
        data: a data set.
        column: of the images, or of their files' paths.
        folder: where relative paths start.

    Attributes:
        decodes: how many images have been decoded.
    """

    def __init__(self, data: datasets.Dataset, column: str = "image", folder: Path = Path()) -> None:
        self._data = data.select_columns([column])
        self._column = column
        self._folder = folder
        self.decodes = 0

    def __getitem__(self, row: int) -> Tensor:
        """Pixels of a row, [3, 64, 64] uint8.

        Raises:
            RowError: the image cannot be decoded.
        """
        key = self, row
        pixels = _decoded.get(key)
        if pixels is None:
            pixels = _decoded[key] = pixels_of(self.original(row))
            self.decodes += 1
        return pixels

    def original(self, row: int) -> Image.Image:
        """The image of a row in RGB, in its own size; it is not kept.

        Raises:
            RowError: it cannot be decoded.
        """
        try:
            value = self._data[row][self._column]
            image: Image.Image = open_image(self._folder / value) if isinstance(value, str) else value
            return image.convert("RGB")
        except Exception as error:  # whatever the decoders of all image formats raise
            raise RowError("has no image", row, f" of column {self._column!r}", str(error)) from error


_decoded: LRUCache[tuple[LazyImages, int], Tensor] = LRUCache(DECODED_BYTES, getsizeof=lambda pixels: pixels.nbytes)


def images_of(source: Source, root: str, column: str) -> LazyImages:
    """The images of a source's data set, once a process: its clients share what is decoded."""
    return _images(source.place, root, column)


@lru_cache(maxsize=OPEN)
def _images(source: Source, root: str, column: str) -> LazyImages:
    return LazyImages(open_source(source, root), column, Path(source.path).parent)
