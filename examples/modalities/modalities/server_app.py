"""modalities: the server of FedAvg, which knows the trunk alone."""

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from modalities.task import pretrained

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A whole run."""
    run = context.run_config
    FedAvg(fraction_evaluate=1.0).start(
        grid=grid,
        initial_arrays=ArrayRecord(pretrained(run["checkpoint"]).state_dict()),
        train_config=ConfigRecord({"lr": run["learning-rate"]}),
        num_rounds=run["num-server-rounds"],
    )
