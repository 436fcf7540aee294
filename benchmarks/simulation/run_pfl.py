"""FedAvg by pfl-research (the package `pfl`), in this process; for an interpreter that has it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from small_cnn import LEARNING_RATE, Rounds, SmallCnn, asked, images
from torch import Tensor
from torch.nn import functional as F


class Net(SmallCnn):
    """With the two methods that pfl calls."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch."""
        return F.cross_entropy(self.train()(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """The summed loss of a batch and its size."""
        return {"loss": Weighted(F.cross_entropy(self.eval()(x), y, reduction="sum").item(), len(y))}


class Watch(TrainingProcessCallback):  # type: ignore[misc]
    """Notes when rounds end."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds

    def on_train_begin(self, *, model: Any) -> Metrics:
        """Called before the first round."""
        del model
        self.rounds.end()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int) -> Any:
        """Called after each round."""
        del aggregate_metrics, model, central_iteration
        self.rounds.end()
        return False, Metrics()


def main() -> None:
    """Runs what is asked for."""
    given, rounds = asked(), Rounds()

    @functools.cache
    def data(client: int) -> PyTorchTensorDataset:
        return PyTorchTensorDataset(images(client + 1, given.steps * given.batch), user_id=str(client))

    torch.manual_seed(0)
    clients = FederatedDataset(data, get_user_sampler("random", list(range(given.clients))))
    net = Net()
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=given.rounds,
            evaluation_frequency=given.rounds + 1,
            train_cohort_size=given.sample,
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=clients, val_data=None),
        model,
        NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=LEARNING_RATE,
            local_batch_size=given.batch,
            local_max_grad_norm=None,
        ),
        callbacks=[Watch(rounds)],
    )
    rounds.tell("pfl", net)


if __name__ == "__main__":
    main()
