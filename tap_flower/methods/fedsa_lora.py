"""FedSA-LoRA (Guo et al., ICLR 2025, arXiv 2410.01463): of each LoRA pair A is averaged, and B stays on the client.

A client trains `W + (α / r) · B_i A`. The matrices A, which learn what clients have in common, alone are exchanged.
Whatever else is trainable stays on the client with its B, as the classifier of the paper's RoBERTa does.
"""

from __future__ import annotations

import re
from functools import partial

from tap_flower.core.components import ComponentModel
from tap_flower.errors import ConfigError
from tap_flower.methods.fedper import models, second_stage, train_whole
from tap_flower.methods.method import Method

NAME = "fedsa-lora"
_A = re.compile(r"(^|\.)((?:lora_)?(?:embedding_)?)A(?=\.|$)")
"""In names of tensors: `A` as in `models.lora`, `lora_A` and `lora_embedding_A` as in peft."""


def is_a(component: str, tensor: str) -> bool:
    """Whether a tensor is exchanged: the matrices A are."""
    del component
    return _A.search(tensor) is not None


def has_lora(model: ComponentModel) -> None:
    """Refuses a model without LoRA.

    Raises:
        ConfigError: it has no trainable A, or one without its B.
    """
    names = model.component_map.component_of
    found = {name: _A.sub(r"\1\2B", name) for name in names if is_a("", name)}
    if not found:
        raise ConfigError(
            f"method={NAME} exchanges LoRA's matrices A, and no trainable tensor is named A or lora_A: use another method, "
            f"or name them so"
        )
    if lone := sorted(a for a, b in found.items() if b not in names):
        raise ConfigError(
            f"method={NAME} exchanges LoRA's matrices A, and {lone[0]!r} is named like one, but there is no trainable "
            f"{found[lone[0]]!r}: rename it, or use another method"
        )


METHOD = Method(NAME, train_whole, partial(second_stage, name=NAME), (NAME,), models, is_a, has_lora)
