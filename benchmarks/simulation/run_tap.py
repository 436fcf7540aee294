"""tap-flower's `fedavg` over the same clients, which train by the project's own loop: through Ray, or in this process."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid
from run_flower import federate
from small_cnn import Asked, Rounds, SmallCnn, asked, loader, train

from tap_flower import IMAGE_CLASSIFICATION, Client, TapClientApp, TapStrategy, Task, load_config


class _Enough(Exception):
    """Stage 1, which is FedAvg, is over."""


def app_of(given: Asked, folder: Path) -> TapClientApp:
    """The client of a stock project, with its own loop."""
    app, rows = TapClientApp(), given.steps * given.batch

    @app.client()
    def client(context: Context) -> Client:
        number = int(context.node_config["partition-id"])
        task = Task(
            "images",
            IMAGE_CLASSIFICATION,
            ["image"],
            loader(number, rows, given.batch),
            [],
            validation=None,  # FedAvg decides nothing: all images are for training, as with the others
            forward=lambda net, batch: net(batch[0]),
            target=lambda batch: batch[1],
            fit=lambda net, batches, _: train(net, batches),
        )
        return Client(f"client-{number}", SmallCnn, [task], state_dir=folder / "state")

    return app


def main() -> None:
    """Runs what is asked for."""
    given, rounds, net = asked(), Rounds(), SmallCnn()

    def evaluated(server_round: int, arrays: ArrayRecord) -> None:
        rounds.end()
        net.load_state_dict(arrays.to_torch_state_dict())
        if server_round == given.rounds:
            raise _Enough

    with tempfile.TemporaryDirectory() as folder:
        settings = ["method=fedavg", f"rounds={given.rounds}", f"clients_per_round={given.sample}"]
        settings += ["replacement.evidence=training"]  # nothing is decided, and nothing held out
        config = load_config("plug-in", settings=settings)

        def serve(grid: Grid) -> None:
            strategy = TapStrategy(config=config, run_folder=f"{folder}/run", min_available_nodes=given.clients)
            with contextlib.suppress(_Enough):
                strategy.start(grid, ArrayRecord(SmallCnn().state_dict()), num_rounds=None, evaluate_fn=evaluated)

        torch.manual_seed(0)
        federate(app_of(given, Path(folder)), serve, given)
    rounds.tell("tap-flower", net)


if __name__ == "__main__":
    main()
