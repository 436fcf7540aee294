"""Flower's own FedAvg: through Ray, or in this process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from small_cnn import Asked, Rounds, SmallCnn, asked, loader, train

from tap_flower.run.in_process import InProcessGrid

EXAMPLES = "num-examples"


def federate(app: ClientApp, serve: Callable[[Grid], None], given: Asked) -> None:
    """Has a server work over all clients.

    Args:
        app: of the clients.
        serve: the server's work.
        given: what is asked for.
    """
    if not given.ray:
        serve(InProcessGrid(app, [{"partition-id": number} for number in range(given.clients)], {}))
        return
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        serve(grid)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": given.cores}}
    run_simulation(server, app, given.clients, backend_config=resources)  # type: ignore[arg-type]


def app_of(given: Asked) -> ClientApp:
    """A stock client: it builds the model, loads the values, trains, returns the state."""
    app, rows = ClientApp(), given.steps * given.batch

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        net = SmallCnn()
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        loss = train(net, loader(int(context.node_config["partition-id"]), rows, given.batch))
        metrics = MetricRecord({"loss": loss, EXAMPLES: rows})
        return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)

    return app


def main() -> None:
    """Runs what is asked for."""
    given, rounds, net = asked(), Rounds(), SmallCnn()

    def evaluated(_: int, arrays: ArrayRecord) -> None:
        rounds.end()
        net.load_state_dict(arrays.to_torch_state_dict())

    def serve(grid: Grid) -> None:
        strategy = FedAvg(
            fraction_train=given.sample / given.clients,
            fraction_evaluate=0.0,
            min_train_nodes=given.sample,
            min_available_nodes=given.clients,
        )
        strategy.start(grid, ArrayRecord(SmallCnn().state_dict()), num_rounds=given.rounds, evaluate_fn=evaluated)

    torch.manual_seed(0)
    federate(app_of(given), serve, given)
    rounds.tell("flwr", net)


if __name__ == "__main__":
    main()
