"""A page to try the models of a run's clients side by side; it needs gradio and serves this machine alone."""

from __future__ import annotations

import os
from base64 import b64decode
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from tap_flower.client.description import read_description
from tap_flower.errors import PersonalError, StorageError
from tap_flower.methods.registry import find_method
from tap_flower.personal.answers import Answer, ClassAnswer, TextAnswer
from tap_flower.personal.folders import client_folder, clients_in
from tap_flower.personal.personal_model import PersonalModel
from tap_flower.report.client_records import read_examples

OWN = "an input of your own"
HOST = "127.0.0.1"
_CLASSES = 6
"""Classes whose probabilities are shown."""


class Page:
    """The page. Its parts are built anew when another task is chosen.

    Args:
        gradio: the library `gradio`.
        run: a run folder, or the folder of one client.
    """

    def __init__(self, gradio: Any, run: Path) -> None:
        self._gradio = gradio
        # One client's own folder stands for itself.
        folders = [client_folder(run, name) for name in clients_in(run)] or [client_folder(run)]
        self._tasks = {
            f"{described.client}: {task.name}": (folder, described, task)
            for folder, described in ((folder, read_description(folder)) for folder in folders)
            for task in described.tasks
        }
        self._load = lru_cache(maxsize=8)(PersonalModel.load)

    def blocks(self) -> Any:
        """Builds the page from gradio's parts."""
        gradio, names = self._gradio, list(self._tasks)
        with gradio.Blocks(analytics_enabled=False, title="tap-flower") as blocks:
            gradio.Markdown("# Models of a client, side by side")
            chosen = gradio.Dropdown(names, value=names[0], label="client and task", elem_id="task")
            gradio.render(inputs=chosen)(self._parts)
        return blocks

    def _parts(self, chosen: str) -> None:
        """The inputs of a task, and a column for the answer of each model: the server's, the client's own, the result."""
        gradio, (folder, described, task) = self._gradio, self._tasks[chosen]
        models = list(dict.fromkeys(("server", "personal", find_method(described.settings.method).result)))
        items = read_examples(folder).get(task.name, {}).get("items", [])
        given: dict[str, Any] = {}
        with gradio.Row():
            domain = gradio.Dropdown(list(task.domains), label="domain", visible=len(task.domains) > 1)
            names = [OWN, *(f"test item {n}" for n in range(1, len(items) + 1))]
            item = gradio.Dropdown(names, label="input", elem_id="item", visible=len(items) > 0)
        with gradio.Row():
            if "image" in task.modalities:
                given["image"] = gradio.Image(type="pil", format="png", sources=["upload"], height=240, elem_id="image")
            if "text" in task.modalities:
                given["text"] = gradio.Textbox(label="text", elem_id="text")
        ask = gradio.Button("ask the models", variant="primary", elem_id="ask")
        with gradio.Row():
            columns = [self._column(number, which, task.kind) for number, which in enumerate(models)]

        def show(name: str) -> dict[Any, Any]:
            shown = {} if name == OWN else items[names.index(name) - 1]
            image = Image.open(BytesIO(b64decode(shown["image"]))) if "image" in shown else None
            values = {"image": image, "text": shown.get("text", "")}
            return {part: values[modality] for modality, part in given.items()}

        def answer(domain: str, *inputs: Any) -> dict[Any, Any]:
            wanted: dict[str, Any] = {modality: value or None for modality, value in zip(given, inputs, strict=True)}
            try:
                found = [self._load(folder, which).predict(task.name, **wanted, domain=domain) for which in models]
            except (PersonalError, StorageError) as error:
                raise gradio.Error(str(error)) from error
            return dict(zip(columns, map(self._shown, found), strict=True))

        item.input(show, item, list(given.values()))
        for asked in (ask.click, *([given["text"].submit] if "text" in given else [])):
            asked(answer, [domain, *given.values()], columns)

    def _column(self, number: int, which: str, kind: str) -> Any:
        """A column with a model's name; returns the part for its answer."""
        gradio = self._gradio
        with gradio.Column(min_width=240, elem_id=f"answer-{number}"):
            gradio.Markdown(f"### {which}")
            if kind == "image_generation":
                return gradio.Image(format="png", height=240, interactive=False)
            if kind == "text_generation":
                return gradio.Textbox(label="answer", interactive=False)
            return gradio.Label(num_top_classes=_CLASSES, label="class")

    def _shown(self, answer: Answer) -> Any:
        if isinstance(answer, ClassAnswer):
            return dict(answer.probabilities)
        if isinstance(answer, TextAnswer):
            return answer.text
        return self._gradio.update(value=answer.image, label=f"squared error {answer.mse:.3f}")


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
        raise PersonalError('the page needs gradio: pip install "tap-flower[demo-page]"') from error
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
