"""The ServerApp: that of tap-flower, with whatever preset and settings the run configuration names."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from tap_flower.config import simulated_run
from tap_flower.server.strategy import TapStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A whole run."""
    config, folder = simulated_run(context.run_config, context.run_id)
    resume = bool(context.run_config.get("resume", False))
    TapStrategy(config=config, run_folder=folder, resume=resume).start(grid)
