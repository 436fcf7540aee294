"""Images of a data set: decoded when they are first used, brought to the form that their task says, normalised."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, cast

import datasets
import numpy as np
import torch
from cachetools import LRUCache
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from tap_flower import hub
from tap_flower.data.fields import ImageForm
from tap_flower.data.sources import OPEN, RowError, SourceError, folder_of, open_source
from tap_flower.data.spec import ClientSpec, Source
from tap_flower.errors import BackboneError

DECODED_BYTES = 1 << 30
"""Size limit of the decoded images that a process keeps: 87,000 of 64×64 pixels, 7,100 of 224×224."""
_TURNED = (5, 6, 7, 8)
"""Orientations in EXIF data with width for height."""
DARK = 0.25
"""Share of the range of 16 bits below which an image's largest value is worth a note."""
_LONGEST_PATH = 1000
"""Characters of a path; a longer text is something else, the bytes of an image in base64 for example."""
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


# --- the form that a task's images are brought to -------------------------------------------------


def with_image_forms(spec: ClientSpec) -> ClientSpec:
    """A client spec whose tasks say the whole form of their images; what it leaves out is the backbone's own.

    Raises:
        BackboneError: something is left out, and the backbone has no image processor.
    """
    tasks = tuple(
        replace(task, image=_completed(task.image, spec.backbone, spec.revision)) if "image" in task.roles else task
        for task in spec.tasks
    )
    return replace(spec, tasks=tasks)


def _completed(form: ImageForm, backbone: str, revision: str | None) -> ImageForm:
    if form.is_complete:
        return form
    own = processor_form(backbone, revision)
    return replace(
        form, size=form.size or own.size, fit=form.fit or own.fit, mean=form.mean or own.mean, std=form.std or own.std
    )


@lru_cache(maxsize=16)
def processor_form(backbone: str, revision: str | None = None) -> ImageForm:
    """The form that a backbone's own image processor gives images.

    Args:
        backbone: `demo`, a local folder, or a hub id.
        revision: commit, tag or branch of a hub id.

    Raises:
        BackboneError: it has no image processor, or one that gives no square images.
    """
    place = hub.locate(backbone)
    hub.check_folder(place)
    hub.prepare(place)
    remedy = "set `image: {size: …, fit: …, mean: …, std: …}` in the task"
    try:
        found: Mapping[str, Any] = ImageProcessingMixin.get_image_processor_dict(place, revision=revision)[0]
    except Exception as error:  # whatever transformers and the hub's library raise
        reason = str(error).partition("\n")[0]
        raise BackboneError(f"backbone {backbone!r} has no image processor ({reason}): {remedy}") from error
    cropped = bool(found.get("do_center_crop"))
    side, shortest = _side(found.get("size"))
    if cropped:
        side = _side(found.get("crop_size"))[0] or side
    plain = found.get("do_normalize") is False
    try:
        form = ImageForm(
            size=side,
            fit="squeeze" if not shortest else "crop" if cropped else "pad",
            mean=(0.0, 0.0, 0.0) if plain else tuple(found.get("image_mean") or ()),
            std=(1.0, 1.0, 1.0) if plain else tuple(found.get("image_std") or ()),
        )
    except (TypeError, ValueError) as error:
        raise BackboneError(f"backbone {backbone!r} has an image processor with {error}: {remedy}") from error
    if not form.is_complete:
        raise BackboneError(f"backbone {backbone!r} has an image processor without size, mean or std: {remedy}")
    return form


def _side(size: Any) -> tuple[int, bool]:
    """(side in pixels, whether it is that of the shorter side) from a processor's `size`; (0, False) where it says none."""
    if isinstance(size, int):
        return size, True
    if isinstance(size, Mapping) and size.get("height") == size.get("width") and isinstance(size.get("height"), int):
        return cast(int, size["height"]), False
    if isinstance(size, Mapping) and isinstance(size.get("shortest_edge"), int):
        return cast(int, size["shortest_edge"]), True
    return 0, False


# --- from a file to pixels ------------------------------------------------------------------------


def opened_image(file: Path | BytesIO) -> Image.Image:
    """An image of which nothing but the beginning has been read.

    Raises:
        Exception: whatever the decoders raise; ValueError where it is none that they know.
    """
    try:
        return Image.open(file)
    except UnidentifiedImageError as error:
        length = len(file.getvalue()) if isinstance(file, BytesIO) else file.stat().st_size
        where = "its bytes" if isinstance(file, BytesIO) else str(file)
        raise ValueError(
            f"{where} ({length:,} bytes) cannot be read as an image: save it as PNG, JPEG or WebP"
        ) from error


def open_image(file: Path | BytesIO, background: str = "white", side: int = 0) -> Image.Image:
    """The image of a file in RGB with 8 bits a channel, turned as its EXIF data say.

    Deeper images are scaled by what their type says: 65,535 is white in 16 bits, 1.0 is white in floating point.

    Args:
        file: with one picture.
        background: colour behind transparent pixels.
        side: a JPEG may be decoded at a fraction of its size, each side at least twice this long; 0 decodes it whole.

    Returns:
        The image; its `info` has `size`, (width, height) of the whole picture, and `used`, the share of 16 bits up to its
        largest value, where it has so many.

    Raises:
        Exception: whatever the decoders raise; ValueError where a type has no scale, or the file holds several pictures.
    """
    with opened_image(file) as image:
        pictures = getattr(image, "n_frames", 1)
        if pictures > 1 and image.format != "MPO":  # a camera's JPEG, with previews behind the picture
            raise ValueError(f"it holds {pictures} pictures (frames or pages): save the one that is meant")
        size = image.size[::-1] if image.getexif().get(ExifTags.Base.Orientation) in _TURNED else image.size
        if side:
            image.draft(None, (2 * side, 2 * side))
        found = _rgb(ImageOps.exif_transpose(image), image.format, background)
        found.info["size"] = size
        return found


def _rgb(image: Image.Image, kind: str | None, background: str) -> Image.Image:
    used = None
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):  # Pillow 10 opens 16 bits as I
        if "transparency" in image.info:
            raise ValueError("it has 16 bits and a transparent value: save it with 8 bits")
        values = np.asarray(image)
        used = float(values.max()) / 65535
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    elif image.mode == "I":
        raise ValueError(
            "it has whole numbers of 32 bits (or with a sign), which have no scale: save it with 8 or 16 bits"
        )
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"it has 32-bit floating-point values from {values.min():g} to {values.max():g}: save them between 0 and 1"
            )
        image = Image.fromarray((values * 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    image = image.convert("RGB")
    image.info = {} if used is None else {"used": used}
    return image


def pixels_of(image: Image.Image, form: ImageForm) -> Tensor:
    """What clients hold of an image: [3, size, size] uint8, RGB."""
    image, side = _rgb(image, image.format, form.background), (form.size, form.size)
    if form.fit == "crop":
        image = ImageOps.fit(image, side)
    elif form.fit == "pad":
        image = ImageOps.pad(image, side, color=form.background)
    elif image.size != side:
        image = image.resize(side)
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))


def normalise(pixels: Tensor, form: ImageForm) -> Tensor:
    """uint8 pixels [B, 3, H, W] -> float32, (pixel / 255 - mean) / std by channel. The one place that normalises."""
    mean, std = _mean_and_std(form, pixels.device)
    return (pixels.float() / 255 - mean) / std


def denormalise(images: Tensor, form: ImageForm) -> Tensor:
    """Normalised pixels [B, 3, H, W] -> the nearest uint8 pixels: the way back from `normalise`."""
    mean, std = _mean_and_std(form, images.device)
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _mean_and_std(form: ImageForm, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(form.mean, device=device).view(1, 3, 1, 1),
        torch.tensor(form.std, device=device).view(1, 3, 1, 1),
    )


class LazyImages:
    """The images of a data set as uint8 pixels, each decoded when it is used, and then kept.

    All data sets of a process share `DECODED_BYTES`; beyond them, the images that were not used for longest are forgotten.

    Args:
        data: a data set.
        column: of images, of the bytes of their files, or of the files' paths.
        form: that the images are brought to.
        folder: where relative paths start; None allows none.

    Attributes:
        decodes: how many images have been decoded.
    """

    def __init__(self, data: datasets.Dataset, column: str, form: ImageForm, folder: Path | None = Path()) -> None:
        self._data = data.select_columns([column])
        if isinstance(self._data.features[column], datasets.Image):
            self._data = self._data.cast_column(column, datasets.Image(decode=False))
        self._column, self._folder, self.form = column, folder, form
        self.decodes, self._checked = 0, set[int]()

    def __getitem__(self, row: int) -> Tensor:
        """Pixels of a row, [3, size, size] uint8.

        Raises:
            RowError: the image cannot be decoded.
        """
        key = self, row
        with _lock:
            pixels = _decoded.get(key)
        if pixels is None:
            image = self.original(row)
            with self._row_told(row):
                pixels = pixels_of(image, self.form)
            with _lock:
                if pixels.nbytes <= _decoded.maxsize:
                    _decoded[key] = pixels
                self.decodes += 1
        return pixels

    def check(self, row: int) -> None:
        """Reads the beginning of a row's file, which is quick; what is broken behind it shows when the image is decoded.

        Raises:
            RowError: it is no image.
        """
        if row not in self._checked:
            with self._row_told(row), opened_image(self._file(row)):
                self._checked.add(row)

    def _file(self, row: int) -> Path | BytesIO:
        return _file(self._data[row][self._column], self._folder)

    @contextmanager
    def _row_told(self, row: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the decoders of all image formats raise
            reason = str(error) or type(error).__name__
            raise RowError("has no image", row, f" of column {self._column!r}", reason) from error

    def original(self, row: int) -> Image.Image:
        """The image of a row as `open_image` gives it, in no smaller size than its form needs; it is not kept.

        Raises:
            RowError: it cannot be decoded.
        """
        with self._row_told(row):
            return open_image(self._file(row), self.form.background, self.form.size)


def _path(value: str, folder: Path | None) -> Path:
    if _ADDRESS.match(value):
        raise ValueError(f"{value} is an address: download the file, and give its path")
    if folder is None and not Path(value).is_absolute():
        raise ValueError(
            f"{value} starts at the table's folder, and the tables lie in several: list each as a source of its own"
        )
    return Path(folder or "", value)


def _file(value: object, folder: Path | None) -> Path | BytesIO:
    """The file of an image column's value."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return BytesIO(value)
    if isinstance(value, str) and 0 < len(value) <= _LONGEST_PATH:
        return _path(value, folder)
    what = "is empty" if value in (None, "") else f"holds a {type(value).__name__}"
    if isinstance(value, str) and value:
        what = f"holds a text of {len(value):,} characters, which is no path"
    raise ValueError(f"the column {what}: give an image, its file's bytes, or its file's path")


_decoded: LRUCache[tuple[LazyImages, int], Tensor] = LRUCache(DECODED_BYTES, getsizeof=lambda pixels: pixels.nbytes)
_lock = Lock()
"""Of `_decoded`: loader workers are threads."""


def images_of(source: Source, root: str, column: str, form: ImageForm) -> LazyImages:
    """The images of a source's data set, once a process: its clients share what is decoded."""
    return _images(source.place, root, column, form)


@lru_cache(maxsize=OPEN)
def _images(source: Source, root: str, column: str, form: ImageForm) -> LazyImages:
    return LazyImages(open_source(source, root), column, form, folder_of(source))


def with_absolute_paths(data: datasets.Dataset, column: str, source: Source) -> datasets.Dataset:
    """The rows of a source with its images' paths made absolute, so that they can be kept elsewhere.

    Raises:
        SourceError: a path is relative, and the source's files lie in several folders.
    """
    if data.features[column] != datasets.Value("string"):
        return data
    folder = folder_of(source)
    try:
        paths = [str(_path(value, folder).absolute()) if value else value for value in data[column]]
    except ValueError as error:
        raise SourceError(f"column {column!r} of {source}: {error}") from error
    return data.remove_columns(column).add_column(column, paths)
