"""Images of a data set, decoded when they are first used."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tap_flower.data.sources import RowError, open_source
from tap_flower.data.spec import Source
from tap_flower.recent import Recent

IMAGE_SIZE = 64
"""Side of the images that clients hold, in pixels."""
DECODED_BYTES = 1 << 30
"""Of decoded images that a process keeps: 87,000, more than twice those of the paper's largest client."""


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

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """Pixels of some rows, [n, 3, 64, 64] uint8.

        Raises:
            RowError: an image cannot be decoded.
        """
        return torch.stack([self._pixels(row) for row in rows])

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

    def _pixels(self, row: int) -> Tensor:
        pixels = _decoded.get((self, row))
        if pixels is None:
            pixels = self._decode(row)
            self.decodes += 1
            _decoded.put((self, row), pixels, pixels.nbytes)
        return pixels

    def _decode(self, row: int) -> Tensor:
        return pixels_of(self.original(row))


_decoded: Recent[tuple[LazyImages, int], Tensor] = Recent(DECODED_BYTES)


def images_of(source: Source, root: str, column: str) -> LazyImages:
    """The images of a source's data set, once a process: its clients share what is decoded."""
    return _images(source.place, root, column)


@cache
def _images(source: Source, root: str, column: str) -> LazyImages:
    return LazyImages(open_source(source, root), column, Path(source.path).parent)
