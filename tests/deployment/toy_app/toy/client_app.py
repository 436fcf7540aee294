"""The ClientApp: the node's configuration names the client, one of `TASKS`."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Context
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tap_flower import IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION, Client, TapClientApp, Task, TaskKind

from .faults import wait_where_told

REGRESSION = TaskKind.of(
    "regression",
    lambda output, target: (output - target).square().mean(-1),
    lambda student, teacher, target, temperature: (student - teacher).square().mean(-1),
)
KINDS = {"digits": IMAGE_CLASSIFICATION, "mood": REGRESSION, "topic": TEXT_CLASSIFICATION}
TASKS = {"ann": "digits", "bob": "mood", "cleo": "topic", "dora": "digits"}
"""Client -> its task. What belongs to bob's and to cleo's has no other holder."""
INPUTS = {"digits": 4, "mood": 3, "topic": 5}


class Net(nn.Module):
    """[B, INPUTS of the task] -> [B, 3], through a trunk that all clients share."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({task: nn.Linear(INPUTS[task], 6)})
        self.trunk = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
        self.heads = nn.ModuleDict({task: nn.Linear(6, 3)})

    def forward(self, task: str, inputs: Tensor) -> Tensor:
        """The task's three numbers for each example."""
        return self.heads[task](self.trunk(torch.relu(self.encoders[task](inputs))))


def examples(name: str, task: str, count: int) -> TensorDataset:
    """The target is the first three inputs, or which of them is the largest; each client has examples of its own."""
    inputs = torch.rand(count, INPUTS[task], generator=torch.Generator().manual_seed(sorted(TASKS).index(name) + count))
    return TensorDataset(inputs, inputs[:, :3] if task == "mood" else inputs[:, :3].argmax(1))


app = TapClientApp()


@app.client()
def client(context: Context) -> Client:
    """The client of this node."""
    name = str(context.node_config["client"])
    if "faults" in context.node_config:
        wait_where_told(Path(str(context.node_config["faults"])), name)
    task = TASKS[name]
    whole = Task(
        task,
        KINDS[task],
        ["numbers"],
        examples(name, task, 32),
        examples(name, task, 16),
        forward=lambda net, batch: net(task, batch[0]),
        target=lambda batch: batch[1],
    )
    return Client(name, lambda: Net(task), [whole])
