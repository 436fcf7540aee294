"""The commands that use a client's models: `predict`, `export`, `demo`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tap_flower.client.description import read_description
from tap_flower.errors import PersonalError
from tap_flower.personal.folders import chosen_task, client_folder
from tap_flower.report.results import RESULTS

if TYPE_CHECKING:
    from tap_flower.personal.answers import Answer

_PLACE = "A run folder, or one client's: RUN/clients/NAME, on a node STATE-DIR/NAME/RUN."
Place = Annotated[Path, typer.Argument(metavar="RUN_OR_STATE", help=_PLACE)]
Client = Annotated[str | None, typer.Option(help="Whose model, where the run has several clients.")]
Task = Annotated[str | None, typer.Option(help="Its task, where the client has several.")]
Model = Annotated[str | None, typer.Option(help="server, personal, tap, …; the best one without it.")]


def predict(
    place: Place,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT...", help="Files of images, or texts, for a task with one input."),
    ] = None,
    client: Client = None,
    task: Task = None,
    model: Model = None,
    image: Annotated[list[Path] | None, typer.Option(help="A file of an image; may be repeated.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text; as many as images.")] = None,
    domain: Annotated[str | None, typer.Option(help="Of the inputs, where the task's data have several.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for generated images, as 0.png, 1.png, …")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """What a client's model answers to images or texts."""
    folder = client_folder(place, client)
    wanted = {one.name: one for one in read_description(folder).tasks}
    task = chosen_task(task, wanted)
    given: dict[str, list[Any]] = {"image": image or [], "text": text or []}
    if inputs and len(wanted[task].modalities) > 1:
        raise PersonalError(f"task {task!r} takes an image and a text: give them with --image and --text")
    given[wanted[task].modalities[0]] += inputs or []
    if not any(given.values()):
        raise PersonalError(f"task {task!r} got no input: give {' and '.join(wanted[task].modalities)}")
    # Imported here: it brings torch and transformers, which what was checked so far does without.
    from tap_flower.personal.personal_model import PersonalModel

    _without_progress_bars()
    loaded = PersonalModel.load(folder, model)
    answers = loaded.predict(task, given["image"] or None, given["text"] or None, domain)
    for number, answer in enumerate(answers):
        values = _plain(answer, number, out)
        typer.echo(json.dumps(values, ensure_ascii=False) if as_json else _line(values))


def export(
    place: Place,
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    client: Client = None,
    task: Task = None,
    model: Model = None,
) -> None:
    """One task of a client's model as plain tensors without LoRA, with a model card."""
    from tap_flower.personal.export import export as write

    folder = client_folder(place, client)
    task = chosen_task(task, {one.name: one for one in read_description(folder).tasks})
    run = next((parent for parent in (place, folder.parent.parent) if (parent / RESULTS).exists()), None)
    _without_progress_bars()
    written = write(folder, out, task, model, run)
    typer.echo(f"model {written.which!r} of client {written.description.client!r}, task {task!r}, in {out}")


def demo(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or one client's.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the page, on this machine alone.")] = 7860,
) -> None:
    """A page for trying the models of a run's clients side by side."""
    from tap_flower.personal.page import serve

    Console().print(f"to look at: http://127.0.0.1:{port}; Ctrl+C ends it", highlight=False, soft_wrap=True)
    serve(run, port).block_thread()


def _without_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call,unused-ignore]


def _plain(answer: Answer, number: int, out: Path | None) -> dict[str, Any]:
    """An answer as plain values; an image is written to a file, where a folder is given."""
    values = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer)}
    if "image" in values:
        picture = values.pop("image")
        if out is not None:
            try:
                out.mkdir(parents=True, exist_ok=True)
                picture.save(out / f"{number}.png")
            except OSError as error:
                raise PersonalError(f"{out} cannot be written: {error}; give another folder with --out") from error
            values["image"] = str(out / f"{number}.png")
    return values


def _line(values: dict[str, Any]) -> str:
    """An answer in a line."""
    if "label" in values:
        return f"{values['label']} ({values['probability']:.3f})"
    if "text" in values:
        return str(values["text"])
    return f"mse {values['mse']:.4f}" + (f": {values['image']}" if "image" in values else "")
