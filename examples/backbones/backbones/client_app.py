"""Two clients: one has digits, the other digits and names."""

from functools import partial

from flwr.app import Context

from backbones.data import LANGUAGES, digits, names, share
from backbones.model import backbone
from tap_flower import IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION, Client, Pair, TapClientApp, Task
from tap_flower.models.model import ModelTask, TapModel

CLIENTS = {"ann": ["digits"], "bob": ["digits", "languages"]}
TASKS = {
    "digits": ModelTask(Pair("digits", ("image",)), IMAGE_CLASSIFICATION.name, ("digits",), classes=10),
    "languages": ModelTask(Pair("languages", ("text",)), TEXT_CLASSIFICATION.name, ("names",), classes=len(LANGUAGES)),
}


def see(net: TapModel, batch: list) -> object:
    """Logits of the digits."""
    return net("digits", {"image": batch[0], "domain": "digits"})


def read(net: TapModel, batch: list) -> object:
    """Logits of the languages."""
    return net("languages", {"input_ids": batch[0], "attention_mask": batch[0] != 0, "domain": "names"})


app = TapClientApp()


@app.client()
def client(context: Context) -> Client:
    """The client of this node."""
    number = int(context.node_config["partition-id"])
    name, has = list(CLIENTS.items())[number]
    made = {
        "digits": (IMAGE_CLASSIFICATION, ["image"], digits, see),
        "languages": (TEXT_CLASSIFICATION, ["text"], names, read),
    }
    tasks = [
        Task(task, kind, modalities, *share(data(), number, len(CLIENTS)), forward, lambda batch: batch[1])
        for task, (kind, modalities, data, forward) in made.items()
        if task in has
    ]
    return Client(name, partial(TapModel, backbone(), [TASKS[task] for task in has]), tasks)
