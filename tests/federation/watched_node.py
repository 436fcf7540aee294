"""A node under an audit hook: what Python opens, imports, starts and connects to while a server talks to it.

    python -m tests.federation.watched_node FOLDER MESSAGE_TYPE…

FOLDER holds `ann.yaml`. The last line of the output is what `watch` returns, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

CANARY = "kanarienvogel"
"""In every path, name and code that the hostile server sends."""
EVENTS = (
    *(
        "open",
        "import",
        "os.listdir",
        "os.scandir",
        "os.chdir",
        "shutil.rmtree",
        "os.remove",
        "os.rename",
        "os.symlink",
        "os.link",
    ),
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn"),
    *("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "pickle.find_class"),
)


def hostile(values: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Plain values of instructions with a path, a hub id or code in every place that could take one."""
    words = [
        f"{folder}/{CANARY}",
        f"../../{CANARY}",
        f"{CANARY}/hub-id",
        f"file://{folder}/{CANARY}",
        f"http://{CANARY}.invalid/",
    ]
    words += [
        f"${{oc.env:{CANARY}}}",
        f"__import__('os').system('touch {folder}/{CANARY}')",
        f"{{{{ ''.__class__ }}}} {CANARY}",
    ]
    settings = values["hyper_parameters"]
    added: list[tuple[str, Any]] = [
        *(("backbone", word) for word in words),
        *(("data", {"root": word}) for word in words),
        *(("clients", [{"name": word, "backbone": word, "tasks": []}]) for word in words),
        *(("metrics", {"bertscore": word, "meteor": True}) for word in words),
        *(("templates", {"text": word}) for word in words),
        *(("trackers", word) for word in ("tensorboard", "mlflow", *words)),
        *(("preset", word) for word in words),
    ]
    parts = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    places = [(part, key) for part in parts for key, value in part.items() if isinstance(value, str)]
    found = [{**values, "hyper_parameters": {**settings, key: value}} for key, value in added]
    found += [{**values, key: value} for key, value in added]
    found += [{**values, "run": word} for word in words]
    for part, key in places:
        old = part[key]
        for word in words:
            part[key] = word
            found.append(json.loads(json.dumps(values)))
        part[key] = old
    return found


_seen: list[tuple[str, str]] | None = None
"""The events of a watch that goes on. A hook cannot be taken away again: it looks away."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event in EVENTS and not (event == "open" and isinstance(arguments[0], int)):
        _seen.append((event, " ".join(str(argument) for argument in arguments[:3])))


def watch(folder: Path, message_types: Collection[str]) -> dict[str, Any]:
    """Sends honest messages to a node in this process, then hostile ones of some types.

    Returns:
        `honest` and `hostile`, the events meanwhile, and `answers` to the hostile ones.
    """
    global _seen
    from client_app.app import app
    from tap_flower.config import Encoding, load_config, sent_hyper_parameters
    from tap_flower.server.roster import Roster
    from tap_flower.wire import messages
    from tap_flower.wire.messages import EVALUATE, FIELDS, MANIFEST, PERSONALISE, TRAIN, Epoch, Instruction, Manifest
    from tap_flower.wire.tensors import encode_tensors

    settings = ["train.steps=1", "train.batch_size=2", "train.accumulation=1", "distill.iterations=1"]
    parameters = sent_hyper_parameters(load_config("demo", "", settings))
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    node = {"client-spec": str(folder / "ann.yaml"), "state-dir": str(folder / "state")}
    run = {
        "config": f"{folder}/{CANARY}",
        "out": f"{folder}/{CANARY}",
        "preset": CANARY,
        "set": f"data.root={folder}/{CANARY}",
    }
    context = Context(run_id=1, node_id=1, node_config=dict(node), state=RecordDict(), run_config=dict(run))

    def ask(kind: str, content: RecordDict) -> Message:
        message = Message(content, dst_node_id=1, message_type=kind)
        message.metadata.__dict__["_message_id"] = "m"
        return app(message, context)

    def instruction(run: str, number: int) -> Instruction:
        return Instruction(run=run, epochs=(Epoch("h", 0),), round=number, hyper_parameters=parameters)

    def honest(run: str) -> None:
        manifest = messages.decode(ask(MANIFEST, messages.encode(instruction(run, 0))).content, Manifest, "the client")
        arrays = encode_tensors(Roster(41).first_values(manifest, manifest.tensors), Encoding.float32)
        for kind, number in ((TRAIN, 1), (PERSONALISE, 1), (EVALUATE, 1)):
            reply = ask(kind, messages.encode(instruction(run, number), arrays))
            assert not reply.has_error(), reply.error.reason

    sys.addaudithook(_hook)
    first, second, answers = list[tuple[str, str]](), list[tuple[str, str]](), list[str]()
    _seen = first
    honest("r1")
    _seen = second
    base = messages.encode(instruction("r1", 2), encode_tensors({}, Encoding.float32))
    for kind in message_types:
        for values in hostile(json.loads(str(base.config_records[FIELDS]["json"])), folder):
            reply = ask(kind, RecordDict({**base, FIELDS: ConfigRecord({"json": json.dumps(values)})}))
            answers.append(reply.error.reason if reply.has_error() else "")
    _seen = None
    return {"honest": sorted(set(first)), "hostile": sorted(set(second)), "answers": answers}


if __name__ == "__main__":
    print(json.dumps(watch(Path(sys.argv[1]).resolve(), sys.argv[2:])))
