"""What `check` finds in small inputs as people have them, and what writes such inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tap_flower.data.check import Problem, SplitSummary, check_data
from tap_flower.data.spec import read_spec

RED, BLUE = (255, 0, 0), (0, 0, 255)
AB = ("a", "b")


@dataclass
class Found:
    """What `check` finds in a client of one task, whose training and test rows are the same."""

    problems: str
    notes: str
    train: SplitSummary | None

    @property
    def labels(self) -> list[str]:
        assert self.train is not None
        return [example.found["label"] for example in self.train.examples]

    @property
    def texts(self) -> list[str]:
        assert self.train is not None
        return [example.found["text"] for example in self.train.examples]

    def mean(self, row: int = 0) -> Any:
        assert self.train is not None, self.problems
        return np.array(self.train.examples[row].found["image"]["mean"])


def check(source: dict[str, Any], kind: str = "text_classification", **task: Any) -> Found:
    image = kind.startswith("image")
    columns = {"image": "image"} if image else {"text": "text"}
    columns |= {"label": "label"} if kind.endswith("classification") else {}
    values = {
        "name": "t", "kind": kind, "modalities": ["image" if image else "text"], "domain": "d", "columns": columns,
        "classes": list(AB) if kind.endswith("classification") else [], "train": source, "test": source,
    }  # fmt: skip
    spec, errors = read_spec({"name": "c", "backbone": "demo", "tasks": [values | task]})
    problems = [Problem(str(error)) for error in errors]
    summaries: list[SplitSummary] = []
    if spec is not None:
        summaries, more = check_data(spec, 40, 41)
        problems += more
    told = ["\n".join(str(problem) for problem in problems if problem.is_note is is_note) for is_note in (False, True)]
    return Found(told[0], told[1], summaries[0] if summaries else None)


def csv(folder: Path, text: str, written: str = "utf-8", **more: Any) -> dict[str, Any]:
    (folder / "data.csv").write_bytes(text.encode(written))
    return {"format": "csv", "path": str(folder / "data.csv"), **more}


def json_(folder: Path, *rows: Any) -> dict[str, Any]:
    (folder / "data.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return {"format": "json", "path": str(folder / "data.jsonl")}


def parquet(folder: Path, columns: dict[str, Any]) -> dict[str, Any]:
    pq.write_table(pa.table(columns), folder / "data.parquet")
    return {"format": "parquet", "path": str(folder / "data.parquet")}


def picture(path: Path, colour: Any = RED, mode: str = "RGB", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 20), colour).save(path, **options)


def folder_of(folder: Path, **more: Any) -> dict[str, Any]:
    return {"format": "imagefolder", "path": str(folder / "images"), **more}


def one_image(folder: Path, made: Image.Image | Sequence[Image.Image], suffix: str = "png", **task: Any) -> Found:
    frames = [made] if isinstance(made, Image.Image) else list(made)
    more = {"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}
    frames[0].save(folder / f"a.{suffix}", **more)
    return check(csv(folder, f"image,label\na.{suffix},a\n"), "image_classification", **task)
