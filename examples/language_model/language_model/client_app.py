"""Three clients that translate the names of emoji: into Spanish, into German, into both."""

from dataclasses import replace

from flwr.app import Context

from language_model.data import examples, names
from language_model.model import Net
from tap_flower import TEXT_GENERATION, Client, TapClientApp, Task

TRANSLATION = replace(TEXT_GENERATION, name="translation", headline="perplexity", higher_is_better=False)
"""Exact matches of whole words would be too much to ask of so small a model."""
CLIENTS = {"ann": ["spanish"], "bob": ["german"], "cleo": ["spanish", "german"]}
CODES = {"spanish": "es", "german": "de"}


def task(name: str, number: int) -> Task:
    """A task with the client's share of the names: every third, and of these every fifth to test on."""
    mine = names(CODES[name])[number :: len(CLIENTS)]
    return Task(
        name,
        TRANSLATION,
        ["text"],
        examples([pair for at, pair in enumerate(mine) if at % 5]),
        examples(mine[::5]),
        forward=lambda net, batch: net(name, batch[0]),
        target=lambda batch: batch[1],
    )


app = TapClientApp()


@app.client()
def client(context: Context) -> Client:
    """The client of this node."""
    number = int(context.node_config["partition-id"])
    name, tasks = list(CLIENTS.items())[number]
    return Client(name, lambda: Net(tasks), [task(each, number) for each in tasks])
