"""Tiny checkpoints with random weights, and the demo's tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import FlavaConfig, FlavaModel, ViltConfig, ViltModel

from tap_flower.data.text import load_tokenizer
from tap_flower.hub import locate

SIZE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def tiny_flava(folder: Path) -> None:
    """A FLAVA with as many layers as L = 1 needs."""
    part = SIZE | {"num_hidden_layers": 1}
    config = FlavaConfig(
        image_config=part | {"image_size": 64, "patch_size": 32},
        text_config=part | {"vocab_size": len(load_tokenizer(locate("demo")))},
        multimodal_config=SIZE | {"num_hidden_layers": 2},
        hidden_size=32,
        projection_dim=32,
    )
    _save(FlavaModel(config), folder)


def tiny_vilt(folder: Path) -> None:
    """A ViLT with as many layers as L = 4 needs, and position embeddings for images of 384 pixels, as the real one has."""
    vocabulary = len(load_tokenizer(locate("demo")))
    _save(ViltModel(ViltConfig(**SIZE, num_hidden_layers=8, vocab_size=vocabulary)), folder)


def _save(model: FlavaModel | ViltModel, folder: Path) -> None:
    torch.manual_seed(0)
    model.save_pretrained(folder)
    load_tokenizer(locate("demo")).save_pretrained(folder)
