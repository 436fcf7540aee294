"""lora: the server of FedAvg."""

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict

from lora.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A whole run."""
    run = context.run_config
    FedAvg(fraction_evaluate=1.0).start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(Net(run["checkpoint"]))),
        train_config=ConfigRecord({"lr": run["learning-rate"]}),
        num_rounds=run["num-server-rounds"],
    )
