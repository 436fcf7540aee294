"""Two clinics with other patients: one predicts how a disease goes on, the other that and the body mass index."""

import torch
from flwr.app import Context
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import TensorDataset, random_split

from regression.kind import REGRESSION
from tap_flower import Client, TapClientApp, Task

BMI, CLINICS = 2, 2


class Net(nn.Module):
    """[B, 9] -> a number for each example and task."""

    def __init__(self, *tasks: str) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(9, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(32, 1) for task in tasks})

    def forward(self, task: str, patients: Tensor) -> Tensor:
        """The task's number for each patient [B]."""
        return self.heads[task](self.trunk(patients)).squeeze(-1)


def patients(clinic: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The clinic's patients [N, 9] without their body mass index, and what is to be predicted of them."""
    table, progression = (torch.tensor(array).float() for array in load_diabetes(return_X_y=True))
    table, progression = table[clinic::CLINICS] * 20, progression[clinic::CLINICS]
    known = torch.cat([table[:, :BMI], table[:, BMI + 1 :]], dim=1)
    return known, {"progression": (progression - 150) / 75, "bmi": table[:, BMI]}


app = TapClientApp()


@app.client()
def client(context: Context) -> Client:
    """The clinic of this node."""
    clinic = int(context.node_config["partition-id"])
    names = ["progression", "bmi"][: clinic + 1]
    known, targets = patients(clinic)
    tasks = []
    for name in names:
        data = TensorDataset(known, targets[name])
        train, test = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(clinic))
        tasks.append(
            Task(
                name,
                REGRESSION,
                ["record"],
                train,
                test,
                forward=lambda net, batch, name=name: net(name, batch[0]),
                target=lambda batch: batch[1],
            )
        )
    return Client(f"clinic-{clinic}", lambda: Net(*names), tasks)
