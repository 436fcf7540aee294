"""The ServerApp: configuration, strategy, start."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from tap_flower.config import simulated_run
from tap_flower.server.strategy import TapStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs TAP over the nodes of the grid."""
    config, folder = simulated_run(context.run_config, context.run_id)
    strategy = TapStrategy(config=config, run_folder=folder, resume=bool(context.run_config.get("resume", False)))
    strategy.start(grid=grid)
