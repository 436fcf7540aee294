"""A small GPT-2 that stays as it was pretrained, with LoRA experts: one that all tasks share, one for each task."""

from copy import deepcopy
from functools import cache

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from language_model.data import ALPHABET, LENGTH, examples, names

RANK = 8


@cache
def pretrained() -> GPT2LMHeadModel:
    """The frozen model. A project of your own loads a checkpoint here; this one copies English names for half a minute."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=ALPHABET, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
            )
        )
        inputs, targets = examples([(english, english) for english, _ in names("es")]).tensors
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for step in range(200):
            rows = torch.arange(step * 32, step * 32 + 32) % len(inputs)
            loss = nn.functional.cross_entropy(model(inputs[rows]).logits.transpose(1, 2), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.requires_grad_(False).eval()


class LoRA(nn.Module):
    """x A B, zero at first."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(0.1 * torch.randn(inputs, RANK)), nn.Parameter(torch.zeros(RANK, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return x @ self.A @ self.B


class Experts(nn.Module):
    """A frozen linear map with the shared expert and that of the task."""

    def __init__(self, frozen: nn.Module, tasks: list[str]) -> None:
        super().__init__()
        self.frozen = frozen
        self.experts = nn.ModuleDict({name: LoRA(*frozen.weight.shape) for name in ["shared", *tasks]})
        self.task = tasks[0]

    def forward(self, x: Tensor) -> Tensor:
        """As the frozen map, and what the two experts add."""
        return self.frozen(x) + self.experts["shared"](x) + self.experts[self.task](x)


class Net(nn.Module):
    """The language model of a client's tasks; it writes through its own head.

    Args:
        tasks: their names.
    """

    def __init__(self, tasks: list[str]) -> None:
        super().__init__()
        self.gpt = deepcopy(pretrained())
        for block in self.gpt.transformer.h:
            block.attn.c_attn = Experts(block.attn.c_attn, tasks)
            block.mlp.c_fc = Experts(block.mlp.c_fc, tasks)

    def forward(self, task: str, characters: Tensor) -> Tensor:
        """Logits of the next character at every position: [B, S] -> [B, S, ALPHABET]."""
        for part in self.modules():
            if isinstance(part, Experts):
                part.task = task
        return self.gpt(characters).logits
