"""A personal model that is a mixture, trained beside another model on the same batches, for APFL and FedDAT."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tap_flower.core.components import State, cpu_state
from tap_flower.core.training import Batch, Optimisation, adamw
from tap_flower.methods.method import Memory
from tap_flower.methods.session import Session

LOCAL, SHARE = "local", "share"
"""In a memory: the client's own part of the mixture, and its share."""
OWN_LOOP = "trains two models step by step on the same batches, which are the loop's own"


class Mixture:
    """`share · local + (1 − share) · other`, a model whose training moves `local` alone.

    `session.train` trains the other model, and calls for each batch an objective that calls `backward`, for each step an
    update that calls `step` and `mix`. Steps of the mixture count as the session's.

    Args:
        session: the client at work.
        local: where `local` starts, on the CPU.
        other: tensor name -> value on the session's device; it may move between steps.
        share: between 0 and 1; it may be changed before `mix`.
        optimisation: that of the other model.
    """

    def __init__(
        self,
        session: Session,
        local: State,
        other: Mapping[str, Tensor],
        share: float,
        optimisation: Optimisation,
    ) -> None:
        self.model = session.model(local)
        self.model.train()
        self.session, self.other, self.share, self.optimisation = session, other, share, optimisation
        self.mixed = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.local = {name: nn.Parameter(p.detach().clone()) for name, p in self.mixed.items()}
        self.optimizer, _ = adamw(self.local.items(), session.with_head_factor(self.model, optimisation))
        session.steps += optimisation.steps
        self.mix()

    def backward(self, batch: Batch, further: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Adds the gradient of the task's loss, and of a further loss of the output; returns the output, detached."""
        output: Tensor = self.model(batch.task, batch.inputs)
        loss = self.session.kinds[batch.task].losses(output, batch.target).mean()
        if further is not None:
            loss = loss + further(output)
        (loss / self.optimisation.accumulation).backward()  # type: ignore[no-untyped-call]
        return output.detach()

    def slope(self) -> float:
        """The loss's derivative by `share`: ⟨local − other, ∇F(mixture)⟩."""
        parts = [
            ((self.local[name].detach() - self.other[name]) * p.grad).sum()
            for name, p in self.mixed.items()
            if p.grad is not None
        ]
        return float(torch.stack(parts).sum()) if parts else 0.0

    @torch.no_grad()
    def step(self) -> None:
        """A step of `local` by its own gradient, `share · ∇F(mixture)`."""
        for name, p in self.mixed.items():
            self.local[name].grad = None if p.grad is None else self.share * p.grad
            p.grad = None
        torch.nn.utils.clip_grad_norm_(self.local.values(), self.optimisation.clip_norm)
        self.optimizer.step()

    @torch.no_grad()
    def mix(self) -> None:
        """Gives the model the values of the mixture."""
        for name, p in self.mixed.items():
            p.copy_(torch.lerp(self.other[name], self.local[name], self.share))

    def kept(self) -> Memory:
        """What the client keeps: `local`, with buffers as the mixture has moved them, and its share."""
        local = {name: value.detach().cpu() for name, value in self.local.items()}
        return Memory({LOCAL: {**cpu_state(self.model), **local}}, {SHARE: self.share})


def mixture(received: State, memory: Memory) -> State:
    """The mixture of what the server sent and what the client kept; without the latter, the server's model as it is."""
    if not (local := memory.models.get(LOCAL)):
        return received
    return {name: torch.lerp(value, local[name], memory.record[SHARE]) for name, value in received.items()}


def mixed_models(received: State, memory: Memory, first: Callable[[], State]) -> dict[str, State | None]:
    """The server's copy, and the mixture."""
    del first
    return {"server": received, "personal": mixture(received, memory)}
