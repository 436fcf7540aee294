"""The server: TAP with the settings of the preset `plug-in`."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from tap_flower import TapStrategy, load_config

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A whole run."""
    run = context.run_config
    config = load_config("plug-in", settings=["train.steps=60", "distill.iterations=60"])
    strategy = TapStrategy(config=config, run_folder=Path(str(run["out"])).absolute())
    result = strategy.start(grid, num_rounds=int(run["num-server-rounds"]))
    for task, models in result.tasks.items():
        print(task, {name: round(metrics["accuracy"], 3) for name, metrics in models.items()})
