"""The ClientApp: Flower's decorators around `tap_flower.federation.client`, nothing else.

The handlers are imported by the first message: Flower's simulation loads the app in a process that handles none, and
would start Ray only after the import of transformers and datasets.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query("manifest")
def manifest(message: Message, context: Context) -> Message:
    """Says who the client is and what it holds."""
    from tap_flower.federation import client

    return client.manifest(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Takes part in a round of stage 1."""
    from tap_flower.federation import client

    return client.train(message, context)


@app.train("distill")
def distill(message: Message, context: Context) -> Message:
    """Runs stage 2."""
    from tap_flower.federation import client

    return client.distill(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluates the client's models on its test data."""
    from tap_flower.federation import client

    return client.evaluate(message, context)
