"""The ServerApp: that of tap-flower, with whatever preset and settings the run configuration names."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from tap_flower.server import main as server

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A whole run."""
    server.run(grid, context)
