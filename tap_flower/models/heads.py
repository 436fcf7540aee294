"""Heads: from pooled features [B, D] to the output of a task."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2Model

IMAGE_SIZE = 64
"""Side, in pixels, of the paper's images."""


class ImageHead(nn.Module):
    """Image generation: D -> 4096 -> 64×8×8, then three transposed convolutions, each of which doubles the sides.

    For images of another size than 64×64 the 8×8 positions are interpolated in between, so that the tensors are the same.

    Args:
        size: D.
        image_size: side of the images in pixels, a multiple of 8.
    """

    def __init__(self, size: int, image_size: int = IMAGE_SIZE) -> None:
        super().__init__()
        self.side = image_size // 8
        self.proj = nn.Linear(size, 64 * 8 * 8)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(64, 32, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 16, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 3, kernel_size=4, stride=2, padding=1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> normalised pixels [B, 3, image_size, image_size]."""
        seed = self.proj(features).view(-1, 64, 8, 8)  # [B, 64, 8, 8]
        if self.side != 8:
            seed = F.interpolate(seed, (self.side, self.side), mode="bilinear")  # [B, 64, side, side]
        return cast(Tensor, self.decoder(seed))  # [B, 3, image_size, image_size]


class TextHead(nn.Module):
    """Text generation: all positions at once, from a table of positions and the pooled features.

    Each position attends to the pooled features, and the result is added to it. There is one thing to attend to, so the
    softmax of that attention is 1 whatever query and key are: what is left of it, and all that is held here, are its
    value and output projections. A one-layer GPT-2 follows (4 heads, inner size 2D, causal), then Linear D -> vocabulary.

    Args:
        size: D.
        vocabulary: number of tokens.
        length: longest text, in tokens.
    """

    def __init__(self, size: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(length, size)
        self.value = nn.Linear(size, size)
        self.output = nn.Linear(size, size)
        tokens = {"vocab_size": 1, "bos_token_id": None, "eos_token_id": None}  # its input is never token ids
        config = GPT2Config(**tokens, n_positions=length, n_embd=size, n_layer=1, n_head=4, n_inner=2 * size)
        self.gpt2 = GPT2Model(config)
        del self.gpt2.wte
        self.vocabulary = nn.Linear(size, vocabulary, bias=False)

    def forward(self, features: Tensor, length: int) -> Tensor:
        """Logits of the first `length` positions: [B, D] -> [B, length, V]. Causal, so they do not depend on `length`."""
        condition = self.output(self.value(features))  # [B, D]
        states = self.positions.weight[:length] + condition[:, None]  # [B, length, D]
        mask = _causal(length, features.device)
        hidden = self.gpt2(
            inputs_embeds=states, attention_mask=mask, use_cache=False
        ).last_hidden_state  # [B, length, D]
        return cast(Tensor, self.vocabulary(hidden))  # [B, length, V]


def _causal(length: int, device: torch.device) -> Tensor | None:
    """The causal mask [1, 1, length, length] bool; on a CPU None, with which transformers finds it itself.

    For that it asks whether several texts are packed into one, and a processor waits for a GPU to tell.
    """
    if device.type == "cpu":
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
