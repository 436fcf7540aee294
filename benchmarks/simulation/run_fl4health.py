"""FedAvg by FL4Health, in this process; for an interpreter that has it. Its clients train one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fl4health.clients.basic_client import BasicClient
from fl4health.servers.base_server import FlServer
from fl4health.strategies.basic_fedavg import BasicFedAvg
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.client_manager import SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from small_cnn import LEARNING_RATE, Asked, Rounds, SmallCnn, asked, loader
from torch import nn


class Clinic(BasicClient):  # type: ignore[misc]
    """A client of the comparison; its validation loader is never read."""

    def __init__(self, number: int, given: Asked) -> None:
        super().__init__(data_path=Path(), metrics=[], device=torch.device("cpu"), client_name=str(number))
        self.batches = loader(number, given.steps * given.batch, given.batch)

    def get_model(self, config: Any) -> nn.Module:
        """The model."""
        del config
        return SmallCnn()

    def get_optimizer(self, config: Any) -> torch.optim.Optimizer:
        """Plain SGD."""
        del config
        return torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def get_criterion(self, config: Any) -> nn.Module:
        """The loss."""
        del config
        return nn.CrossEntropyLoss()

    def get_data_loaders(self, config: Any) -> Any:
        """Training and validation data."""
        del config
        return self.batches, self.batches


class Nearby(ClientProxy):  # type: ignore[misc]
    """A client in the server's process."""

    def __init__(self, number: int, client: Clinic) -> None:
        super().__init__(str(number))
        self.client = client

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Has it train."""
        del timeout, group_id
        values, examples, metrics = self.client.fit(parameters_to_ndarrays(ins.parameters), ins.config)
        return FitRes(Status(Code.OK, ""), ndarrays_to_parameters(values), examples, metrics)

    def _not_used(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    get_properties = get_parameters = evaluate = reconnect = _not_used


def main() -> None:
    """Runs what is asked for."""
    given, rounds, net = asked(), Rounds(), SmallCnn()
    torch.manual_seed(0)
    first = [value.numpy() for value in SmallCnn().state_dict().values()]

    def evaluated(server_round: int, values: Any, config: Any) -> None:
        del server_round, config
        rounds.end()
        net.load_state_dict(dict(zip(net.state_dict(), map(torch.as_tensor, values), strict=True)))

    strategy = BasicFedAvg(
        fraction_fit=given.sample / given.clients,
        fraction_evaluate=0.0,
        min_fit_clients=given.sample,
        min_available_clients=given.clients,
        evaluate_fn=evaluated,
        on_fit_config_fn=lambda number: {"current_server_round": number, "local_epochs": 1, "batch_size": given.batch},
        initial_parameters=ndarrays_to_parameters(first),
    )
    manager = SimpleClientManager()
    for number in range(given.clients):
        manager.register(Nearby(number, Clinic(number, given)))
    server = FlServer(client_manager=manager, fl_config={}, strategy=strategy, accept_failures=False)
    server.set_max_workers(1)
    server.fit(given.rounds, None)
    rounds.tell("fl4health", net)


if __name__ == "__main__":
    main()
