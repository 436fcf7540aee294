"""The commands that use a client's models: `predict`, `export`, `demo`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tap_flower.cli.common import say
from tap_flower.errors import PersonalError

if TYPE_CHECKING:
    from tap_flower.personal.answers import Answer

_PLACE = "A run folder, or one client's: RUN/clients/NAME, on a node STATE-DIR/NAME/RUN."
Place = Annotated[Path, typer.Argument(metavar="RUN_OR_STATE", help=_PLACE)]
Client = Annotated[str | None, typer.Option(help="Choose the client, where the run has several.")]
Task = Annotated[str | None, typer.Option(help="Choose the task, where the client has several.")]
Model = Annotated[
    str | None, typer.Option(help="Choose the model: server, personal, tap, …", show_default="the method's result")
]


def predict_command(
    place: Place,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT...", help="Image files or texts, for a task with one input."),
    ] = None,
    client: Client = None,
    task: Task = None,
    model: Model = None,
    image: Annotated[list[Path] | None, typer.Option(help="Give an image file; may be repeated.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Give a text; may be repeated, as often as --image.")] = None,
    domain: Annotated[
        str | None, typer.Option(help="Name the domain of the inputs, where the task has several.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write generated images into this folder, as 0.png, 1.png, …")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Ask a client's model: print its answers to images or texts."""
    from tap_flower.client.description import read_description
    from tap_flower.personal.folders import chosen_task, client_folder

    folder = client_folder(place, client)
    wanted = chosen_task(task, read_description(folder))
    given: dict[str, list[Any]] = {"image": image or [], "text": text or []}
    if inputs and len(wanted.modalities) > 1:
        raise PersonalError(f"task {wanted.name!r} takes an image and a text: give them with --image and --text")
    given[wanted.modalities[0]] += inputs or []
    if files := [text for text in given["text"] if os.path.isfile(text)]:  # noqa: PTH113 (a long text is no path)
        raise PersonalError(f'text {files[0]!r} is a file: give what it holds, "$(cat {files[0]})" for example')
    if out is not None:
        _check_out(out, wanted.name, wanted.kind, len(given[wanted.modalities[0]]))
    if not any(given.values()):
        raise PersonalError(f"task {wanted.name!r} got no input: give {' and '.join(wanted.modalities)}")
    # Imported here: it brings transformers, which what was checked so far does without.
    from tap_flower.personal.personal_model import PersonalModel

    _without_progress_bars()
    answers = PersonalModel.load(folder, model).predict(
        wanted.name, given["image"] or None, given["text"] or None, domain
    )
    for number, answer in enumerate(answers):
        values = _plain(answer, number, out)
        typer.echo(json.dumps(values, ensure_ascii=False) if as_json else _line(values))


def export_command(
    place: Place,
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    client: Client = None,
    task: Task = None,
    model: Model = None,
) -> None:
    """Export one task of a client's model: plain tensors without LoRA, tokenizer, model card."""
    from tap_flower.client.description import read_description
    from tap_flower.personal.export import export
    from tap_flower.personal.folders import chosen_task, client_folder
    from tap_flower.report.results import RESULTS

    folder = client_folder(place, client)
    name = chosen_task(task, read_description(folder)).name
    run = next((parent for parent in (place, folder.parent.parent) if (parent / RESULTS).exists()), None)
    _without_progress_bars()
    written = export(folder, out, name, model, run)
    typer.echo(f"model {written.which!r} of client {written.description.client!r}, task {name!r}, in {out}")


def demo_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or one client's.")],
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Serve the page at this port, on this machine alone.")
    ] = 7860,
) -> None:
    """Compare the models of a run's clients side by side, on a page in the browser."""
    from tap_flower.personal.demo_page import HOST, serve

    blocks = serve(run, port)
    say(Console(), f"to look at: http://{HOST}:{port}; Ctrl+C ends it")
    blocks.block_thread()


def _without_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call,unused-ignore]


def _check_out(out: Path, task: str, kind: str, count: int) -> None:
    if kind != "image_generation":
        raise PersonalError(f"--out {out}: task {task!r} makes no images, leave --out out")
    if taken := [path for number in range(count) if (path := _picture(out, number)).exists()]:
        raise PersonalError(f"{taken[0]} is there already: give another folder with --out, or remove it")


def _picture(out: Path, number: int) -> Path:
    return out / f"{number}.png"


def _plain(answer: Answer, number: int, out: Path | None) -> dict[str, Any]:
    """Makes an answer plain values, and writes its image to a file where a folder is given."""
    values = dict(vars(answer))
    if "image" in values:
        picture = values.pop("image")
        if out is not None:
            try:
                out.mkdir(parents=True, exist_ok=True)
                picture.save(_picture(out, number))
            except OSError as error:
                raise PersonalError(f"{out} cannot be written: {error}; give another folder with --out") from error
            values["image"] = str(_picture(out, number))
    return values


def _line(values: dict[str, Any]) -> str:
    """Makes an answer a line of text."""
    if "label" in values:
        return f"{values['label']} ({values['probability']:.3f})"
    if "text" in values:
        return str(values["text"])
    return f"mse {values['mse']:.4f}" + (f": {values['image']}" if "image" in values else "")
