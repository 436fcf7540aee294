"""The ClientApp: Flower's decorators around `tap_flower.federation.client`, nothing else."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from tap_flower.federation import client

app = ClientApp()


@app.query("manifest")
def manifest(message: Message, context: Context) -> Message:
    """Says who the client is and what it holds."""
    return client.manifest(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Takes part in a round of stage 1."""
    return client.train(message, context)


@app.train("distill")
def distill(message: Message, context: Context) -> Message:
    """Runs stage 2."""
    return client.distill(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluates the client's models on its test data."""
    return client.evaluate(message, context)
