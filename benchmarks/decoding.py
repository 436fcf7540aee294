"""How fast images are decoded for one client: images a second by their size and the number of workers, and memory.

    python -m benchmarks.decoding --json FILE [--images 5000] [--sides 256 1000 2000] [--workers 0 2 4]

Made-up photographs (JPEG, quality 90) are read by path through the loader that training uses, in the first epoch, when
nothing is decoded yet. `fed` is whether a step of `--step` milliseconds over `--batch` images finds its next batch ready.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import parser
from tap_flower.data.batching import batch_loader
from tap_flower.data.fields import ImageForm
from tap_flower.data.images import DECODED_BYTES
from tap_flower.data.loading import read_source
from tap_flower.data.spec import Source, TaskSpec

PICTURES = 20
"""Files of each size; the rows of the data set name them again and again."""


def write_pictures(folder: Path, side: int) -> list[str]:
    """Paths of JPEG files of side × side pixels with the detail of a photograph: coarse shapes with some noise."""
    random, paths = np.random.default_rng(side), []
    for number in range(PICTURES):
        coarse = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((side, side))
        noisy = np.clip(np.asarray(coarse) + random.normal(0, 6, (side, side, 3)), 0, 255).astype(np.uint8)
        paths.append(str(folder / f"{side}-{number}.jpg"))
        Image.fromarray(noisy).save(paths[-1], quality=90)
    return paths


def measure(folder: Path, side: int, count: int, workers: int, batch: int, form: ImageForm) -> dict[str, Any]:
    """Images a second of one epoch over `count` rows, and the largest memory of this process and of a worker, in MB."""
    table = folder / f"{side}-{workers}.csv"
    paths = write_pictures(folder, side)
    table.write_text("image\n" + "".join(f"{paths[row % PICTURES]}\n" for row in range(count)))
    source = Source("csv", path=str(table))
    task = TaskSpec(
        "t", "image_generation", ("image",), "d", (source,), (source,), columns={"image": "image"}, image=form
    )
    examples = read_source(task, source, None, None, 0, "", lambda *_: None).examples()
    order = [(0, range(start, min(start + batch, count))) for start in range(0, count, batch)]
    began = time.perf_counter()
    read = sum(len(tensors["image"]) for _, tensors in batch_loader([examples], order, workers))
    seconds = time.perf_counter() - began
    peaks = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own, worker = (round(peak) for peak in peaks)
    return {"side": side, "workers": workers, "images/s": round(read / seconds, 1), "own MB": own, "worker MB": worker}


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
    torch.set_num_threads(1)
    form = ImageForm(given.size, "crop", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    needed = given.batch / given.step * 1000
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in given.sides:
            for workers in given.workers:
                row = measure(Path(folder), side, given.images, workers, given.batch, form)
                rows.append(row | {"fed": row["images/s"] >= needed})
                print(rows[-1])
    print(f"a step of {given.step:g} ms with {given.batch} images needs {needed:g} images/s")
    print(f"bound of memory: {DECODED_BYTES / 2**20:g} MB of decoded images in each process")
    if given.json:
        given.json.write_text(json.dumps({"rows": rows, "needed": needed}, indent=1))


if __name__ == "__main__":
    main()
