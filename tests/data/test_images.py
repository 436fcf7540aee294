"""Images as public bug reports have them: each is read as its owner means it, or refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tap_flower.data import images
from tap_flower.data.fields import ImageForm
from tap_flower.data.images import LazyImages, open_image, pixels_of
from tap_flower.data.sources import RowError
from tests.data.people import BLUE, RED, check, csv, one_image, parquet, picture

RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        ((RAMP * 65535).astype(np.uint16), "png"),
        ((RAMP * 65535).astype(np.uint16), "tif"),
        (RAMP.astype(np.float32), "tif"),
        ((RAMP * 255).astype(np.uint8), "png"),
    ],
)
def test_deep_images_are_scaled_by_what_their_type_says(values: Any, suffix: str, tmp_path: Path) -> None:
    found = one_image(tmp_path, Image.fromarray(values), suffix)
    assert found.problems == ""
    assert found.mean() == pytest.approx([0.5] * 3, abs=0.02)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ((RAMP * 2e9).astype(np.int32), "32 bits"),
        ((RAMP * 255).astype(np.float32), "values from 0 to 255: save them between 0 and 1"),
        (np.full((64, 64), np.nan, np.float32), "values from nan to nan"),
    ],
)
def test_images_without_a_scale_are_refused(values: Any, problem: str, tmp_path: Path) -> None:
    assert problem in one_image(tmp_path, Image.fromarray(values), "tif").problems


@pytest.mark.parametrize(
    ("pattern", "problem"), [("[[]*/rows.csv", "list each as a source of its own"), ("[[]a]/r*.csv", "")]
)
def test_paths_start_at_the_folder_of_the_files_that_a_pattern_finds(
    pattern: str, problem: str, tmp_path: Path
) -> None:
    for name in ("[a]", "[b]"):
        picture(tmp_path / name / "1.png")
        (tmp_path / name / "rows.csv").write_text("image,label\n1.png,a\n")
    found = check({"format": "csv", "path": str(tmp_path / pattern)}, "image_classification").problems
    assert problem in found
    assert problem or not found


def test_an_image_that_cannot_be_resized_names_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow before 13 pads no image of a width that becomes 0."""

    def refused(*_: object) -> None:
        raise ValueError("height and width must be > 0")

    monkeypatch.setattr(images, "pixels_of", refused)
    Image.new("RGB", (1, 9000)).save(tmp_path / "1.png")
    data = datasets.Dataset.from_dict({"image": [str(tmp_path / "1.png")]})
    with pytest.raises(RowError, match="has no image in row 0 of column 'image'.*must be > 0"):
        LazyImages(data, "image", ImageForm(8, "pad"))[0]


def test_twelve_bits_in_sixteen_are_told(tmp_path: Path) -> None:
    found = one_image(tmp_path, Image.fromarray((RAMP * 4095).astype(np.uint16)))
    assert "nearly black in row 0 (row 0: 6.2% of 16 bits): scale it" in found.notes


def transparent(mode: str) -> Image.Image:
    alpha = np.zeros((64, 64), np.uint8)
    alpha[16:48, 16:48] = 255
    image = Image.new("LA" if mode == "LA" else "RGBA", (64, 64), 0)
    image.putalpha(Image.fromarray(alpha))
    if mode == "P":
        indexed = Image.fromarray((alpha == 0).astype(np.uint8), "L").convert("P")
        indexed.putpalette([0, 0, 0, 255, 0, 0])
        indexed.info["transparency"] = 1
        return indexed
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize(("background", "mean"), [("white", 0.75), ("black", 0.0), ("#808080", 0.376)])
def test_transparent_images_are_composed(mode: str, background: str, mean: float, tmp_path: Path) -> None:
    more = {} if background == "white" else {"image": {"background": background}}
    found = one_image(tmp_path, transparent(mode), **more)
    assert found.problems == ""
    assert found.mean() == pytest.approx([mean] * 3, abs=0.02)


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp"])
def test_a_file_of_several_pictures_is_refused(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), RED), Image.new("RGB", (20, 20), BLUE)]
    assert "holds 2 pictures" in one_image(tmp_path, frames, suffix).problems


def test_a_photograph_is_turned_as_its_exif_data_say(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    found = check(csv(tmp_path, "image,label\na.png,a\n"), "image_classification")
    assert found.train is not None
    assert found.train.examples[0].found["image"]["size"] == [20, 40]


def encoded(colour: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("form", ["bytes", "mapping", "path", "nested bytes"])
def test_columns_of_bytes_and_paths_are_decoded(form: str, tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    picture(tmp_path / "1.png", BLUE)
    files = [encoded(RED), encoded(BLUE)]
    column: Any = {
        "bytes": pa.array(files, pa.binary()),
        "nested bytes": pa.array([{"bytes": file} for file in files]),
        "mapping": pa.array([{"bytes": file, "path": "gone.png"} for file in files]),
        "path": [{"bytes": None, "path": f"{n}.png"} for n in range(2)],
    }[form]
    found = check(parquet(tmp_path, {"image": column, "label": ["a", "b"]}), "image_classification")
    assert found.problems == ""
    assert (found.mean(0)[0], found.mean(1)[2]) == (1, 1)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("https://host/x.png", "is an address: download the file"),
        ("", "the column is empty"),
        ([1, 2], "the column holds a list"),
        ("iVBORw0KGgo" * 200, "the column holds a text of 2,200 characters, which is no path: give an image"),
        ("gone.png", "gone.png"),
    ],
)
def test_what_is_no_image_is_told(value: Any, problem: str, tmp_path: Path) -> None:
    found = check(parquet(tmp_path, {"image": [value], "label": ["a"]}), "image_classification")
    assert "has no image in row 0 of column 'image'" in found.problems
    assert problem in found.problems


@pytest.mark.parametrize("fit", ["crop", "pad", "squeeze"])
def test_a_large_jpeg_is_decoded_at_a_fraction_with_the_pixels_of_the_whole(fit: str, tmp_path: Path) -> None:
    """Within 2 of 255 on average, and 16 in any pixel."""
    random = np.random.default_rng(1)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((800, 600))
    noisy = np.clip(np.asarray(coarse) + random.normal(0, 6, (600, 800, 3)), 0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noisy).save(tmp_path / "a.jpg", quality=90, exif=exif)
    form = ImageForm(64, fit, (0.5,) * 3, (0.5,) * 3)
    whole, part = (open_image(tmp_path / "a.jpg", side=side) for side in (0, form.size))
    assert (whole.size, part.size) == ((600, 800), (150, 200))  # a quarter is the least that is twice as large as 64
    assert whole.info["size"] == part.info["size"] == (600, 800)
    apart = (pixels_of(whole, form).float() - pixels_of(part, form).float()).abs()
    assert apart.mean() < 2
    assert apart.max() < 16


def test_a_small_jpeg_is_decoded_whole(tmp_path: Path) -> None:
    Image.new("RGB", (255, 300), RED).save(tmp_path / "a.jpg")  # half of 255 is less than twice 64
    assert open_image(tmp_path / "a.jpg", side=64).size == (255, 300)


FORM = {"mean": [0, 0, 0], "std": [1, 1, 1]}


@pytest.mark.parametrize(("form", "share"), [("crop", 1.0), ("pad", 1 / 9), ("squeeze", 1 / 3)])
def test_the_size_and_the_fit_are_the_tasks(form: str, share: float, tmp_path: Path) -> None:
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste((255, 255, 255), (32, 0, 64, 32))
    found = one_image(tmp_path, wide, image={"size": 24, "fit": form, "background": "black", **FORM})
    assert found.train is not None
    assert found.train.examples[0].shown["image"] == "96x32 image, as 24x24"
    assert found.mean() == pytest.approx([share] * 3, abs=0.03)


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"size": 50}, "image has size 50: use a multiple of 8"),
        ({"fit": "stretch"}, "image has fit 'stretch': use one of crop, pad, squeeze"),
        ({"mean": [0.5]}, "image has mean [0.5]: give three numbers"),
        ({"std": [0, 1, 1]}, "image has std [0, 1, 1]: give three numbers from 0.001 to 1"),
        ({"background": "whit"}, "image has background 'whit': give a colour's name"),
        ({"sise": 64}, "did you mean 'size'"),
    ],
)
def test_a_wrong_form_is_refused(form: Any, problem: str, tmp_path: Path) -> None:
    assert problem in one_image(tmp_path, Image.new("RGB", (8, 8)), image=form).problems


@pytest.mark.parametrize(
    ("made", "suffix", "options", "mean"),
    [
        (Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "jpg", {}, [1, 0, 0]),
        (Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "tif", {}, [1, 0, 0]),
        (Image.fromarray(RAMP > 0.75), "png", {}, [0.25] * 3),
        (Image.fromarray(RAMP > 0.75), "tif", {"compression": "group4", "tiffinfo": {262: 0}}, [0.25] * 3),
        (Image.new("RGB", (32, 32), RED), "webp", {"lossless": True}, [1, 0, 0]),
        (Image.new("RGB", (32, 32), RED), "gif", {}, [1, 0, 0]),
        (Image.new("RGB", (32, 32), RED), "ico", {}, [1, 0, 0]),
        (Image.new("RGB", (1, 300), RED), "png", {}, [1, 0, 0]),
    ],
)
def test_other_kinds_of_images(made: Image.Image, suffix: str, options: Any, mean: Any, tmp_path: Path) -> None:
    made.save(tmp_path / f"a.{suffix}", **options)
    found = check(csv(tmp_path, f"image,label\na.{suffix},a\n"), "image_classification")
    assert found.problems == ""
    assert found.mean() == pytest.approx(mean, abs=0.02)


def png16(values: Any, said: tuple[int, int] | None = None) -> bytes:
    """A PNG of 16 bits a channel [H, W, C] with C 2 (grey and alpha), 3 or 4, which Pillow cannot write."""
    height, width, channels = values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    width, height = said or (width, height)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("channels", "mean"), [(2, 0.75), (3, 0.5), (4, 0.75)])
def test_colours_of_sixteen_bits(channels: int, mean: float, tmp_path: Path) -> None:
    """A grey ramp, or black on half a transparent ground, which is composed on white."""
    values = np.repeat((RAMP * 65535)[..., None], channels, 2)
    if channels != 3:
        values[..., :-1], values[..., -1] = 0, 65535 * (np.indices((64, 64))[0] % 32 < 8)
    (tmp_path / "a.png").write_bytes(png16(values))
    found = check(csv(tmp_path, "image,label\na.png,a\n"), "image_classification")
    assert found.problems == ""
    assert found.mean() == pytest.approx([mean] * 3, abs=0.02)


def half(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()[: file.tell() // 2]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("half.jpg", half("JPEG"), "truncated"),
        ("half.png", half("PNG"), "truncated"),
        ("empty.jpg", b"", "empty.jpg (0 bytes) cannot be read as an image"),
        ("photo.heic", b"\0\0\0\x18ftypheic", "photo.heic (12 bytes) cannot be read as an image: save it as PNG"),
        ("bomb.png", png16(np.zeros((1, 1, 3)), (60_000, 60_000)), "exceeds limit"),
    ],
)
def test_broken_images_are_told_in_words(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    problems = check(csv(tmp_path, f"image,label\n{name},a\n"), "image_classification").problems
    assert "has no image in row 0 of column 'image' (row 0: " in problems
    assert reason in problems


def test_bytes_that_are_no_image_are_told_in_words(tmp_path: Path) -> None:
    found = check(parquet(tmp_path, {"image": [b"x"], "label": ["a"]}), "image_classification")
    assert "(row 0: its bytes (1 bytes) cannot be read as an image" in found.problems
