"""Three clients: one has digits, one has names, one has both."""

from flwr.app import Context

from tap_flower import IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION, Client, TapClientApp, Task
from two_modalities.data import ALPHABET, LANGUAGES, digits, names, share
from two_modalities.model import Net

CLIENTS = {"camera": ["digits"], "reader": ["languages"], "both": ["digits", "languages"]}
CLASSES = {"digits": 10, "languages": len(LANGUAGES)}

app = TapClientApp()


@app.client()
def client(context: Context) -> Client:
    """The client of this node."""
    number = int(context.node_config["partition-id"])
    name, has = list(CLIENTS.items())[number]
    tasks = {
        "digits": lambda: Task(
            "digits",
            IMAGE_CLASSIFICATION,
            ["image"],
            *share(digits(), number, len(CLIENTS)),
            forward=lambda net, batch: net.see(batch[0]),
            target=lambda batch: batch[1],
        ),
        "languages": lambda: Task(
            "languages",
            TEXT_CLASSIFICATION,
            ["text"],
            *share(names(), number, len(CLIENTS)),
            forward=lambda net, batch: net.read(batch[0]),
            target=lambda batch: batch[1],
        ),
    }
    classes = {task: CLASSES[task] for task in has}
    return Client(name, lambda: Net(classes, len(ALPHABET) + 1), [tasks[task]() for task in has])
