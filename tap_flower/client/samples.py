"""Answers of a client's models to a few of its test items, for people to look at; they stay on the client."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tap_flower.client.text_metrics import generated
from tap_flower.core.components import ComponentModel
from tap_flower.core.training import Batch
from tap_flower.data.fields import ImageForm
from tap_flower.data.images import denormalise
from tap_flower.data.spec import TaskSpec
from tap_flower.methods.session import Session

ITEMS = 4
"""Test items of each task that are shown."""


@dataclass
class Samples:
    """The first test items of each task of a client, and models' answers to them.

    Attributes:
        session: the client at work.
        specs: its tasks.
        decode: token ids -> text, without special tokens.
        end: id of the separator that closes a text.
        shown: names of the models whose answers are kept.
        tasks: task name -> `kind` and `items`, each with `image` and `text` (its input), `target` and `answers` (by model).
            An image is a WebP in base64. A target or an answer has a `label`, a `text` or an `image`; an answer also has the
            label's `probability`, or the `mse` of an image's normalised pixels.
    """

    session: Session
    specs: Sequence[TaskSpec]
    decode: Callable[[list[int]], str]
    end: int
    shown: Collection[str]
    tasks: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, name: str, model: ComponentModel) -> None:
        """Adds the answers of a model, if it is one of those that are shown."""
        if name not in self.shown:
            return
        model.eval()
        for task in self.specs:
            batch = self.session.data.first("test", task.name, ITEMS, self.session.device)
            found = self.tasks.setdefault(task.name, {"kind": task.kind, "items": self._inputs(batch, task.image)})
            answers = self._answers(task, batch, model(batch.task, batch.inputs))
            for item, (target, answer) in zip(found["items"], answers, strict=True):
                item["target"] = target
                item["answers"][name] = answer

    def _inputs(self, batch: Batch, form: ImageForm) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = [{"answers": {}} for _ in batch.target]
        if "image" in batch.inputs:
            for item, image in zip(items, batch.inputs["image"], strict=True):
                item["image"] = _encoded(image, form)
        if "input_ids" in batch.inputs:
            for item, ids in zip(items, batch.inputs["input_ids"].tolist(), strict=True):
                item["text"] = self.decode(ids)
        return items

    def _answers(self, task: TaskSpec, batch: Batch, output: Tensor) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(target, answer) of each item."""
        if task.kind == "text_generation":
            return [
                ({"text": reference}, {"text": prediction})
                for prediction, reference in generated(batch, output, self.decode, self.end)
            ]
        if task.kind == "image_generation":
            errors = self.session.kinds[batch.task].losses(output, batch.target).tolist()
            return [
                ({}, {"image": _encoded(image, task.image), "mse": error})
                for image, error in zip(output, errors, strict=True)
            ]
        probability, label = output.softmax(-1).max(-1)
        return [
            ({"label": task.classes[target]}, {"label": task.classes[chosen], "probability": share})
            for target, chosen, share in zip(batch.target.tolist(), label.tolist(), probability.tolist(), strict=True)
        ]


def _encoded(image: Tensor, form: ImageForm) -> str:
    """Normalised pixels [3, H, W] as a WebP in base64: about a sixth of a PNG."""
    pixels = denormalise(image[None], form)[0].permute(1, 2, 0).cpu().numpy()
    file = BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=90)
    return b64encode(file.getvalue()).decode()
