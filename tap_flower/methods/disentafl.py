"""DisentAFL (Chen and Zhang, AAAI 2024, doi 10.1609/aaai.v38i10.29010): latents of different groups are made orthogonal.

As TAP's paper runs it, over the same architecture: FedAvg with the further loss `0.5 · mean of cos²` between the latents of
different (modality, kind of task) groups. A latent is the token mean of a sample after its modality-task path's MoTE.
A mini-batch has one task: its groups (image and text of a visual question) are compared with each other, and with
those that the groups of the client's other tasks had in their last mini-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tap_flower.core.components import ComponentModel, State
from tap_flower.core.training import Batch
from tap_flower.errors import ConfigError
from tap_flower.methods.method import Memory, Method, Participation, finetunes
from tap_flower.methods.session import Session

NAME, WEIGHT = "disentafl", 0.5
Latents = Mapping[tuple[str, str], Tensor]
"""(modality, kind) -> latents [samples, D]."""


def disentanglement(new: Latents, old: Latents) -> Tensor:
    """`0.5 · mean cos²`: over pairs of samples, then over pairs of groups of which one at least is new; 0 without a pair."""
    pairs = [(a, b) for i, a in enumerate(new) for b in [*list(new)[i + 1 :], *(g for g in old if g not in new)]]
    if not pairs:
        return torch.zeros(())
    known = {**old, **new}
    unit = {group: F.normalize(known[group], dim=-1) for pair in pairs for group in pair}
    return WEIGHT * torch.stack([(unit[a] @ unit[b].T).square().mean() for a, b in pairs]).mean()


class Disentanglement:
    """The objective of a model's training; it watches the model's latents."""

    def __init__(self, model: Any) -> None:
        self.new: dict[tuple[str, str], Tensor] = {}
        self.old: dict[tuple[str, str], Tensor] = {}
        model.fusion.observe = self.new.__setitem__

    def __call__(self, batch: Batch, output: Tensor) -> Tensor:
        """The loss of the latents that came up since the last call."""
        del batch
        loss = disentanglement(self.new, self.old).to(output.device)
        self.old |= {group: latents.detach() for group, latents in self.new.items()}
        self.new.clear()
        return loss


def participate(session: Session, server_round: int, received: State, memory: Memory) -> Participation:
    """Trains the server's copy, with the further loss."""
    del memory
    return Participation(*session.train_round(server_round, received, "server", Disentanglement))


def has_latents(model: ComponentModel) -> None:
    """Refuses a model without latents by modality and kind of task.

    Raises:
        ConfigError: it is not over one of the backbones.
    """
    if not hasattr(model, "fusion"):
        raise ConfigError(f"method={NAME} needs the fusion of tap-flower's own models: use another method")


OWN_LOOP = "compares latents of one batch with those of others, which only tap-flower's own loop takes in turn"
METHOD = Method(NAME, participate, finetunes(NAME), (NAME,), suits=has_latents, own_loop=OWN_LOOP)
