"""A node under an audit hook: what Python opens, imports, starts and connects to while a server talks to it.

    python -m tests.federation.watched_node FOLDER

FOLDER holds `ann.yaml`. The last line of the output is JSON: for the honest and for the hostile messages the events, and the
answers to the hostile ones.
"""

from __future__ import annotations

import json
import sys
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


def main(folder: Path) -> None:
    """Sends honest messages, then hostile ones, then honest ones again."""
    from client_app.app import app
    from tap_flower.config import load_config, sent_hyper_parameters
    from tap_flower.federation import messages
    from tap_flower.federation.manifest import decode_manifest
    from tap_flower.federation.messages import DISTILL, EVALUATE, MANIFEST, TRAIN, Instruction

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
    events: list[tuple[str, str]] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and not (event == "open" and isinstance(arguments[0], int)):
            events.append((event, " ".join(str(argument) for argument in arguments[:3])))

    def ask(kind: str, content: RecordDict) -> Message:
        message = Message(content, dst_node_id=1, message_type=kind)
        message.metadata.__dict__["_message_id"] = "m"
        return app(message, context)

    def phase() -> list[tuple[str, str]]:
        found = sorted(set(events))
        events.clear()
        return found

    def honest(run: str) -> None:
        manifest = decode_manifest(ask(MANIFEST, messages.encode_instruction(Instruction(run, 0, parameters))).content)
        arrays = messages.encode_tensors(manifest.initial_values(manifest.tensors, 41))
        for kind, number in ((TRAIN, 1), (DISTILL, 1), (EVALUATE, 1)):
            reply = ask(kind, messages.encode_instruction(Instruction(run, number, parameters), arrays))
            assert not reply.has_error(), reply.error.reason

    sys.addaudithook(hook)
    honest("r1")
    first, answers = phase(), []
    base = messages.encode_instruction(Instruction("r1", 2, parameters), {})
    for kind in (MANIFEST, TRAIN, DISTILL, EVALUATE):
        for values in hostile(messages.decode(base), folder):
            reply = ask(kind, RecordDict({**base, "tap": ConfigRecord({"json": json.dumps(values)})}))
            answers.append(reply.error.reason if reply.has_error() else "")
    print(json.dumps({"honest": first, "hostile": phase(), "answers": answers}))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
