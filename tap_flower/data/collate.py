"""From examples to tensors: normalised pixels, padded token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tap_flower.core.tasks import IGNORE, IMAGE_STD

TokenIds = Sequence[int] | NDArray[np.int32]
"""Token ids of one text."""
IMAGE_MEAN = (0.5071, 0.4865, 0.4409)
"""Mean of each channel, of pixels between 0 and 1."""


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels [B, 3, H, W] -> float32, mean 0 and deviation 1 by channel. The one place that normalises."""
    mean = torch.tensor(IMAGE_MEAN, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=pixels.device).view(1, 3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def denormalise(images: Tensor) -> Tensor:
    """Normalised pixels [B, 3, H, W] -> the nearest uint8 pixels that there are: the way back from `normalise`."""
    mean = torch.tensor(IMAGE_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=images.device).view(1, 3, 1, 1)
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def model_inputs(
    domain: str, pixels: Tensor | None, texts: Sequence[TokenIds] | None, pad: int, device: torch.device
) -> dict[str, Any]:
    """What a model gets of a batch, see `models.model.TapModel`.

    Args:
        domain: of the batch.
        pixels: [B, 3, 64, 64] uint8, or None where the task has no image.
        texts: token ids of each example, or None where the task has no text.
        pad: id of the padding token.
        device: of the tensors.
    """
    inputs: dict[str, Any] = {"domain": domain}
    if pixels is not None:
        inputs["image"] = normalise(pixels.to(device))
    if texts is not None:
        inputs |= {name: tensor.to(device) for name, tensor in pad_inputs(texts, pad).items()}
    return inputs


def pad_inputs(texts: Sequence[TokenIds], pad: int) -> dict[str, Tensor]:
    """Token ids padded to the longest text of the batch.

    Args:
        texts: token ids of each example.
        pad: id of the padding token.

    Returns:
        `input_ids` [B, T] int64, and `attention_mask` [B, T] int64 (0 at padding) where something was padded.
    """
    ids = _pad(texts, pad)
    lengths = torch.tensor([len(text) for text in texts])
    if bool((lengths == ids.shape[1]).all()):
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def pad_targets(texts: Sequence[TokenIds]) -> Tensor:
    """Target token ids padded with `IGNORE` to the longest of the batch, [B, S] int64."""
    return _pad(texts, IGNORE)


def _pad(texts: Sequence[TokenIds], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(text, dtype=torch.int64) for text in texts], batch_first=True, padding_value=value
    )
