"""Exports one task of a client's model to a folder of its own: plain tensors without LoRA, tokenizer, model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import AutoConfig

from tap_flower.client.client_model import model_task
from tap_flower.client.description import DESCRIPTION, Description, read_description
from tap_flower.data.text import load_tokenizer
from tap_flower.errors import PersonalError, StorageError
from tap_flower.files import read_json, write_atomically, write_json
from tap_flower.hub import CATALOGUE, DEMO, locate
from tap_flower.models.load import from_config, outline
from tap_flower.models.merged import merged_outline, merged_state
from tap_flower.personal.personal_model import Device, PersonalModel
from tap_flower.plain import shown

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_PIPELINES = {
    "image_classification": "image-classification",
    "text_classification": "text-classification",
    "image_generation": "image-to-image",
    "text_generation": "text-generation",
}
"""Kind of task -> the hub's name of it; with an image in and a text out it is `visual-question-answering`."""

_TEMPLATES = Environment(
    loader=PackageLoader("tap_flower.personal", "templates"),
    undefined=StrictUndefined,
    autoescape=False,
    trim_blocks=True,
)


def export(folder: Path, out: Path, task: str, which: str | None = None, run: Path | None = None) -> PersonalModel:
    """Exports one task of a model: writes `model.safetensors`, `config.json`, the tokenizer and a model card.

    Args:
        folder: folder of a client: RUN/clients/NAME, or on a node STATE-DIR/NAME/RUN.
        out: a new folder.
        task: name of the task.
        which: name of the model, such as `tap`; without it, the result of the run's method.
        run: the run folder whose results go into the model card.

    Returns:
        The model that was exported.

    Raises:
        PersonalError: there is no such model or task, or `out` is not empty.
        StorageError: a folder is damaged, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PersonalError(f"{out} is not empty: give another folder")
    described = read_description(folder)
    published = _published(described.backbone)
    model = PersonalModel.load(folder, which, "cpu", torch.float32)
    model.task(task)
    shape = described.settings.model
    backbone = outline(described.backbone, shape.layers, shape.image_size, described.revision)
    (only,) = (model_task(t, shape.text_length) for t in described.tasks if t.name == task)
    with torch.device("meta"):
        merged = merged_outline(backbone, only)
    tensors = merged_state(model.model, merged)
    description = read_json(folder / DESCRIPTION)
    description["backbone"] = published
    description["tasks"] = [t for t in description["tasks"] if t["name"] == task]
    architecture = AutoConfig.from_pretrained(
        locate(described.backbone), revision=described.revision, trust_remote_code=False
    ).to_dict()
    architecture.pop("_name_or_path", None)  # where the checkpoint lies on this machine
    write_atomically(out / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_json(out / CONFIG, {"tap_flower": description, "model": model.which, "backbone_config": architecture})
    model.tokenizer.save_pretrained(out)
    results = {} if run is None else read_json(run / "results.json").get("clients", {})
    found = results.get(described.client, {}).get(task, {}).get(model.which, {})
    write_atomically(
        out / CARD, card(msgspec.structs.replace(described, backbone=published), task, model.which, found).encode()
    )
    return model


def _published(backbone: str) -> str:
    """A backbone as others may know it: of a local folder its name alone."""
    local = Path(backbone).is_absolute() or Path(backbone).is_dir()
    return Path(backbone).name if local else backbone


def load_export(folder: Path | str, device: Device = None) -> PersonalModel:
    """Loads an exported model; neither the run nor the backbone's checkpoint is needed.

    Args:
        folder: a folder that `export` or `tap-flower export` wrote.
        device: where the model computes; without it, a GPU if there is one.

    Raises:
        StorageError: the folder is no export, or is damaged.
        PersonalError: the device cannot be used.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    try:
        described = msgspec.convert(values["tap_flower"], Description)
        (task,) = (model_task(t, described.settings.model.text_length) for t in described.tasks)
        architecture = dict(values["backbone_config"])
        config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
        shape = described.settings.model
        model = merged_outline(from_config(config, shape.layers, shape.image_size), task)
        tensors = load_file(folder / WEIGHTS)
        if other := sorted(tensors.keys() ^ model.state_dict().keys()):
            raise ValueError(f"{len(other)} tensors are missing or unknown, such as {other[0]!r}")
        model.load_state_dict(tensors)
        which, tokenizer = str(values["model"]), load_tokenizer(str(folder))
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise StorageError(
            f"{folder / CONFIG} is damaged, or was not written by `tap-flower export`: {error}"
        ) from error
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise StorageError(f"{folder} is not what its {CONFIG} says: {shown(str(error))}; export it again") from error
    return PersonalModel(described, which, model, tokenizer, device)


def card(described: Description, task: str, which: str, metrics: Mapping[str, float]) -> str:
    """Writes a model card as the hub reads it.

    Args:
        described: description of the client's models.
        task: name of the task.
        which: name of the model.
        metrics: metric -> value on the client's test data; nothing where no results are at hand.
    """
    (wanted,) = (t for t in described.tasks if t.name == task)
    pipeline = _PIPELINES[wanted.kind]
    if wanted.kind == "text_generation" and "image" in wanted.modalities:
        pipeline = "visual-question-answering"
    name = f"{described.client}-{task}-{which}".replace("+", "-")
    data = f"test data of {described.client}"
    facts = CATALOGUE.get(described.backbone)
    header = ModelCardData(
        license="apache-2.0" if described.backbone == DEMO else facts.licence.lower() if facts else "other",
        base_model=described.backbone if "/" in described.backbone else None,
        pipeline_tag=pipeline,
        tags=["tap-flower", "federated-learning", "personalization", wanted.kind],
        metrics=sorted(metrics) or None,
        model_name=name if metrics else None,
        eval_results=[EvalResult(pipeline, task, data, metric, value) for metric, value in sorted(metrics.items())]
        or None,
    )
    return _TEMPLATES.get_template("model_card.md").render(
        header=header.to_yaml(), name=name, which=which, client=described.client, task=wanted, metrics=metrics,
        method=described.settings.method, backbone=described.backbone, weights=WEIGHTS,
    )  # fmt: skip
