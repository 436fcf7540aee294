"""The ServerApp: configuration, strategy, start."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from tap_flower.server import main as server

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs TAP over the nodes of the grid."""
    server.run(grid, context)
