"""How fast images are decoded for one client: images a second by their size and the number of workers, and memory.

    python -m benchmarks.decoding [--json FILE] [--images 5000] [--sides 256 1000 2000] [--workers 0 2 4]

Made-up photographs (JPEG, quality 90) are read by path as training reads them, in the first epoch, when nothing is decoded
yet; later epochs find what the process has kept. `fed` is whether a step of `--step` milliseconds over `--batch` images
finds its next batch ready, `CPU ms` processor time of an image, `MB` the memory that the process took on top of what it
had. A second table compares decoding at a fraction of the size with decoding whole.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import parser, peak_bytes, reset_peak, show
from tap_flower.data import images
from tap_flower.data.batching import read_ahead
from tap_flower.data.examples import Examples
from tap_flower.data.fields import ImageForm
from tap_flower.data.images import DECODED_BYTES, open_image, pixels_of
from tap_flower.data.loading import read_source
from tap_flower.data.spec import Source, TaskSpec

CPU = torch.device("cpu")
FORM = ImageForm(224, "crop", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PICTURES = 20
"""Files of each size; the rows of the data set name them again and again."""


def write_pictures(folder: Path, side: int) -> list[Path]:
    """JPEG files of side × side pixels with the detail of a photograph: coarse shapes with some noise."""
    random, paths = np.random.default_rng(side), []
    for number in range(PICTURES):
        coarse = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((side, side))
        noisy = np.clip(np.asarray(coarse) + random.normal(0, 6, (side, side, 3)), 0, 255).astype(np.uint8)
        paths.append(folder / f"{side}-{number}.jpg")
        Image.fromarray(noisy).save(paths[-1], quality=90)
    return paths


def examples_of(
    paths: Sequence[Path], count: int, workers: int, batch: int, form: ImageForm
) -> tuple[Examples, list[tuple[int, range]]]:
    """The examples of a task over `count` rows that name the files again and again, and the batches of an epoch."""
    table = paths[0].parent / f"{paths[0].stem}-{workers}.csv"
    table.write_text("image\n" + "".join(f"{paths[row % len(paths)]}\n" for row in range(count)))
    source = Source("csv", path=str(table))
    task = TaskSpec(
        "t", "image_generation", ("image",), "d", (source,), (source,), columns={"image": "image"}, image=form
    )
    examples = read_source(task, source, None, None, 0, "")[0].examples(workers)
    return examples, [(0, range(start, min(start + batch, count))) for start in range(0, count, batch)]


def forget_images() -> None:
    """The next epoch decodes all images again."""
    images._decoded.clear()


def epoch(paths: Sequence[Path], count: int, workers: int, batch: int, form: ImageForm) -> dict[str, Any]:
    """Images a second of one epoch over `count` rows, and the memory that it took, in MB."""
    examples, order = examples_of(paths, count, workers, batch, form)
    forget_images()
    reset_peak(CPU)
    before, began, worked = peak_bytes(CPU), time.perf_counter(), time.process_time()
    read = sum(len(examples.collate(items)["image"]) for _, items in read_ahead([examples], order, workers))
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    return {
        "images/s": round(read / seconds, 1),
        "CPU ms": round(1000 * worked / read, 2),
        "MB": round((peak_bytes(CPU) - before) / 1e6),
    }


def fraction(paths: Sequence[Path], form: ImageForm) -> dict[str, Any]:
    """Milliseconds of an image that is decoded whole, or at a fraction, and how far their pixels (0 to 255) differ."""
    found, milliseconds = [], []
    for side in (0, form.size):
        began = time.perf_counter()
        found.append([pixels_of(open_image(path, side=side), form) for path in paths])
        milliseconds.append(round((time.perf_counter() - began) * 1000 / len(paths), 1))
    apart = (torch.stack(found[0]).float() - torch.stack(found[1]).float()).abs()
    ms = dict(zip(("whole ms", "fraction ms"), milliseconds, strict=True))
    return ms | {"mean difference": apart.mean().item(), "largest": int(apart.max())}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    made = parser(__doc__)
    made.add_argument("--images", type=int, default=5000)
    made.add_argument("--sides", type=int, nargs="+", default=[256, 1000, 2000])
    made.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4])
    made.add_argument("--size", type=int, default=224, help="side that the task's images are brought to")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--step", type=float, default=20.0, help="milliseconds of a training step")
    given = made.parse_args(arguments)
    torch.set_num_threads(1)  # as where a GPU computes: the processor's cores are the loader's
    form = ImageForm(given.size, "crop", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    needed = given.batch / given.step * 1000
    rows, compared = [], []
    with tempfile.TemporaryDirectory() as folder:
        for side in given.sides:
            paths = write_pictures(Path(folder), side)
            compared.append({"side": side} | fraction(paths, form))
            for workers in given.workers:
                row = epoch(paths, given.images, workers, given.batch, form)
                rows.append({"side": side, "workers": workers} | row | {"fed": row["images/s"] >= needed})
    show(compared, None)
    show(rows, given.json)
    print(f"a step of {given.step:g} ms with {given.batch} images needs {needed:g} images/s")
    print(f"bound of the decoded images in a process: {DECODED_BYTES / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
