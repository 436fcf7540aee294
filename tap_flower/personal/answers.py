"""The answers of a model, in plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from tap_flower.client.text_metrics import written
from tap_flower.core.tasks import IMAGE_GENERATION
from tap_flower.data.fields import ImageForm
from tap_flower.data.images import denormalise


@dataclass(frozen=True)
class ClassAnswer:
    """The answer of a classification task.

    Attributes:
        label: name of the most likely class.
        probability: probability that the model gives it.
        probabilities: class -> probability.
    """

    label: str
    probability: float
    probabilities: Mapping[str, float]


@dataclass(frozen=True)
class TextAnswer:
    """The answer of a text generation task: the text that the model wrote."""

    text: str


@dataclass(frozen=True)
class ImageAnswer:
    """The answer of an image generation task.

    Attributes:
        image: RGB, in the size of the task's images.
        mse: mean squared error to the input, of normalised pixels.
    """

    image: Image.Image
    mse: float


Answer = ClassAnswer | TextAnswer | ImageAnswer


def class_answers(output: Tensor, classes: Sequence[str]) -> list[Answer]:
    """The answers of a batch, from logits [B, C] and the names of the C classes."""
    found: list[Answer] = []
    for shares in output.softmax(-1).tolist():
        best = max(range(len(classes)), key=shares.__getitem__)
        found.append(ClassAnswer(classes[best], shares[best], dict(zip(classes, shares, strict=True))))
    return found


def image_answers(output: Tensor, inputs: Mapping[str, Any], form: ImageForm) -> list[Answer]:
    """The answers of a batch, from images [B, 3, H, W] normalised as `form` says and the inputs they were made of."""
    errors = IMAGE_GENERATION.losses(output, inputs["image"]).tolist()
    pixels = denormalise(output, form).permute(0, 2, 3, 1).cpu().numpy()
    return [ImageAnswer(Image.fromarray(image), error) for image, error in zip(pixels, errors, strict=True)]


FIRST_TOKENS = 16
"""Length that is generated first, in tokens; it is doubled until every text has ended."""


def text_answers(
    generate: Callable[[int], Tensor], longest: int, end: int, decode: Callable[[list[int]], str]
) -> list[Answer]:
    """The answers of a batch: the most likely tokens of each text, up to its separator.

    Args:
        generate: number of positions -> logits [B, positions, V]; those of a position do not depend on the number.
        longest: largest number of tokens of a text.
        end: id of the separator that closes a text.
        decode: token ids -> text, without special tokens.
    """
    length = min(FIRST_TOKENS, longest)
    while True:
        tokens = generate(length).argmax(-1).tolist()
        if length == longest or all(end in ids for ids in tokens):
            return [TextAnswer(decode(written(ids, end))) for ids in tokens]
        length = min(2 * length, longest)
