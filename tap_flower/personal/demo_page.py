"""A page to try the models of a run's clients side by side; it needs gradio and serves this machine alone."""

from __future__ import annotations

import os
from base64 import b64decode
from collections.abc import Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from tap_flower.client.description import TaskDescription, read_description
from tap_flower.errors import PersonalError, StorageError
from tap_flower.methods.registry import find_method
from tap_flower.personal.answers import Answer, ClassAnswer, ImageAnswer, TextAnswer
from tap_flower.personal.folders import client_folder, clients_in
from tap_flower.personal.personal_model import PersonalModel
from tap_flower.plain import install
from tap_flower.report.client_records import read_examples

OWN = "an input of your own"
HOST = "127.0.0.1"
_CLASSES = 6
"""Classes whose probabilities are shown."""


class Page:
    """The page's behaviour: each method `on_...` returns the new state of the parts that a choice changes.

    Args:
        gradio: the library `gradio`.
        run: a run folder, or the folder of one client.
    """

    def __init__(self, gradio: Any, run: Path) -> None:
        self._gradio = gradio
        # One client's own folder stands for itself.
        self.folders = {name: client_folder(run, name) for name in clients_in(run)}
        if not self.folders:
            folder = client_folder(run)
            self.folders = {read_description(folder).client: folder}
        self._load = lru_cache(maxsize=8)(PersonalModel.load)

    def tasks(self, client: str) -> dict[str, TaskDescription]:
        """The tasks of a client by name."""
        return {task.name: task for task in read_description(self.folders[client]).tasks}

    def models(self, client: str) -> list[str]:
        """The names of the models that are compared: the server's, the client's own, and the method's result."""
        result = find_method(read_description(self.folders[client]).settings.method).result
        return list(dict.fromkeys(("server", "personal", result)))

    def items(self, client: str, task: str) -> Sequence[Mapping[str, Any]]:
        """The test items of a task that the client's folder shows."""
        found: Sequence[Mapping[str, Any]] = read_examples(self.folders[client]).get(task, {}).get("items", [])
        return found

    def on_client(self, client: str) -> tuple[Any, ...]:
        """A client was chosen: its tasks, then all that depends on the task."""
        tasks = list(self.tasks(client))
        return (self._gradio.update(choices=tasks, value=tasks[0]), *self.on_task(client, tasks[0]))

    def on_task(self, client: str, task: str) -> tuple[Any, ...]:
        """A task was chosen: domain, test items, image, text, and the columns of answers."""
        update, wanted = self._gradio.update, self.tasks(client)[task]
        count = len(self.items(client, task))
        return (
            update(choices=wanted.domains, value=wanted.domains[0], visible=len(wanted.domains) > 1),
            update(choices=[OWN, *(f"test item {n + 1}" for n in range(count))], value=OWN, visible=count > 0),
            update(value=None, visible="image" in wanted.modalities),
            update(value="", visible="text" in wanted.modalities),
            *self._columns(client, wanted, {}),
        )

    def on_item(self, client: str, task: str, chosen: str) -> tuple[Any, ...]:
        """A test item was chosen: its image and text."""
        update = self._gradio.update
        if chosen == OWN:
            return update(value=None), update(value="")
        item = self.items(client, task)[int(chosen.split()[-1]) - 1]
        image = Image.open(BytesIO(b64decode(item["image"]))) if "image" in item else None
        return update(value=image), update(value=item.get("text", ""))

    def on_ask(self, client: str, task: str, domain: str, image: Image.Image | None, text: str) -> tuple[Any, ...]:
        """An answer was asked for: the columns with the answers of all models."""
        wanted, answers = self.tasks(client)[task], {}
        given = {"image": image, "text": text or None}
        inputs: dict[str, Any] = {name: given[name] for name in wanted.modalities}
        try:
            for which in self.models(client):
                answers[which] = self._answer(client, which, task, {**inputs, "domain": domain})
        except (PersonalError, StorageError) as error:
            raise self._gradio.Error(str(error)) from error
        return self._columns(client, wanted, answers)

    def _answer(self, client: str, which: str, task: str, inputs: Mapping[str, Any]) -> Answer:
        answer: Answer = self._load(self.folders[client], which).predict(task, **inputs)
        return answer

    def _columns(self, client: str, task: TaskDescription, answers: Mapping[str, Answer]) -> tuple[Any, ...]:
        """Heading, label, text, image and its error of each of three columns; a method may have fewer models."""
        update, models = self._gradio.update, self.models(client)
        found: list[Any] = []
        for which in [*models, *[""] * (3 - len(models))]:
            answer, shown = answers.get(which), bool(which)
            label = answer.probabilities if isinstance(answer, ClassAnswer) else None
            text = answer.text if isinstance(answer, TextAnswer) else ""
            image, error = None, ""
            if isinstance(answer, ImageAnswer):
                image, error = answer.image, f"squared error {answer.mse:.3f}"
            found += [
                update(value=f"### {which}", visible=shown),
                update(value=label, visible=shown and task.kind.endswith("_classification")),
                update(value=text, visible=shown and task.kind == "text_generation"),
                update(value=image, visible=shown and task.kind == "image_generation"),
                update(value=error, visible=shown and task.kind == "image_generation"),
            ]
        return tuple(found)

    def blocks(self) -> Any:
        """Builds the page from gradio's parts."""
        gradio, names = self._gradio, list(self.folders)
        with gradio.Blocks(analytics_enabled=False, title="tap-flower") as blocks:
            gradio.Markdown("# Models of a client, side by side")
            with gradio.Row():
                client = gradio.Dropdown(names, value=names[0], label="client", elem_id="client")
                task = gradio.Dropdown(label="task", elem_id="task")
                domain = gradio.Dropdown(label="domain", elem_id="domain")
                item = gradio.Dropdown(label="input", elem_id="item")
            with gradio.Row():
                image = gradio.Image(type="pil", format="png", sources=["upload"], height=240, elem_id="image")
                text = gradio.Textbox(label="text", elem_id="text")
            ask = gradio.Button("ask the models", variant="primary", elem_id="ask")
            columns: list[Any] = []
            with gradio.Row():
                for number in range(3):
                    with gradio.Column(min_width=240, elem_id=f"answer-{number}"):
                        columns += [
                            gradio.Markdown(),
                            gradio.Label(num_top_classes=_CLASSES, label="class"),
                            gradio.Textbox(label="answer", interactive=False),
                            gradio.Image(format="png", height=240, interactive=False),
                            gradio.Markdown(),
                        ]
            of_task = [domain, item, image, text, *columns]
            blocks.load(self.on_client, client, [task, *of_task])
            client.input(self.on_client, client, [task, *of_task])
            task.input(self.on_task, [client, task], of_task)
            item.input(self.on_item, [client, task, item], [image, text])
            ask.click(self.on_ask, [client, task, domain, image, text], columns)
            text.submit(self.on_ask, [client, task, domain, image, text], columns)
        return blocks


def serve(run: Path, port: int) -> Any:
    """Serves the page to this machine alone; it asks nothing of any network.

    Args:
        run: a run folder, or the folder of one client.
        port: port of the page.

    Returns:
        gradio's Blocks, started: `block_thread()` waits for Ctrl+C, `close()` ends it.

    Raises:
        PersonalError: gradio is not installed, or the port is taken.
        StorageError: there are no models.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
    try:
        import gradio
    except ImportError as error:
        raise PersonalError(f"the page needs gradio: {install('demo-page')}") from error
    blocks = Page(gradio, run).blocks()
    try:
        blocks.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=gradio.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        )
    except OSError as error:
        raise PersonalError(
            f"port {port} of this machine cannot be used: {error}; give another one with --port"
        ) from error
    return blocks
