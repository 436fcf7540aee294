"""The server: TAP with the settings of the preset `plug-in`."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from tap_flower import TapStrategy, load_config

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A whole run."""
    config = load_config("plug-in", settings=[f"rounds={context.run_config['num-server-rounds']}"])
    result = TapStrategy(config=config, run_folder=Path(str(context.run_config["out"])).absolute()).start(grid)
    for task, models in result.tasks.items():
        print(task, {name: round(metrics["r2"], 3) for name, metrics in models.items()})
