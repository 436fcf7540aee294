"""A client's model for raw inputs: pictures and texts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tap_flower.client.client_model import client_model
from tap_flower.client.description import Description, TaskDescription, read_description
from tap_flower.client.state import SERVER, StateFolder
from tap_flower.core.components import State, load_trainable_state
from tap_flower.data.examples import moved_to
from tap_flower.data.fields import ImageForm
from tap_flower.data.images import open_image, pixels_of
from tap_flower.data.loading import input_tensors, model_inputs
from tap_flower.data.text import lengths_of_cut, load_tokenizer, token_ids, tokenizer_hash
from tap_flower.errors import BackboneError, PersonalError, StorageError
from tap_flower.hub import locate
from tap_flower.methods.method import Memory
from tap_flower.methods.registry import find_method
from tap_flower.models.load import load_backbone
from tap_flower.models.model import TapModel
from tap_flower.personal.answers import Answer, class_answers, image_answers, text_answers
from tap_flower.plain import same_backbone

log = logging.getLogger("tap_flower")

Picture = Image.Image | str | Path | NDArray[np.uint8]
"""An image, a file of one, or pixels [H, W, 3] or [H, W], uint8."""
Device = torch.device | str | None


class PersonalModel:
    """One of a client's models, which answers to raw inputs.

    Args:
        description: description of the client's models.
        which: name of the model, such as `tap`.
        model: the module, with its values.
        tokenizer: tokenizer of its backbone.
        device: where it computes; without it, a GPU if there is one.

    Raises:
        PersonalError: the device cannot be used.

    Attributes:
        tasks: name -> task, with kind, modalities, domains and classes.
    """

    def __init__(
        self,
        description: Description,
        which: str,
        model: TapModel,
        tokenizer: PreTrainedTokenizerBase,
        device: Device = None,
    ) -> None:
        self.description, self.which, self.tokenizer = description, which, tokenizer
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.model = model.to(self.device).eval()
        except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
            reason = str(error).partition("\n")[0]
            raise PersonalError(
                f"device {str(device)!r} cannot be used ({reason}): give cpu, cuda or cuda:1"
            ) from error
        self.tasks: dict[str, TaskDescription] = {task.name: task for task in description.tasks}

    @classmethod
    def load(
        cls, folder: Path | str, which: str | None = None, device: Device = None, dtype: torch.dtype | None = None
    ) -> PersonalModel:
        """Loads a model from a client's folder.

        Args:
            folder: RUN/clients/NAME, or on a node STATE-DIR/NAME/RUN.
            which: `server`, `personal`, `tap`, …; without it, the result of the run's method, or before stage 2 the client's
                own model.
            device: where it computes; without it, a GPU if there is one.
            dtype: dtype of the frozen weights; without it, that of the run.

        Raises:
            StorageError: the folder holds no models, or is damaged.
            PersonalError: it has no such model, or its backbone or the device cannot be used.
        """
        folder = Path(folder)
        description = read_description(folder)
        model = outlined(description, dtype)
        states = _states(folder, description, model)
        if not states:
            raise StorageError(
                f"{folder} holds no model yet, or {SERVER} is damaged: wait for the client's first round, or restore it"
            )
        result = find_method(description.settings.method).result
        which = which or (result if result in states else next(reversed(states)))
        if which not in states:
            raise PersonalError(f"{folder} has no model {which!r}: use one of {', '.join(states)}")
        state = states[which]
        try:
            load_trainable_state(model, _first(folder, description, model) if state is None else state)
        except ValueError as error:
            raise StorageError(f"{folder}: model {which!r} is not what model.json says: {error}") from error
        return cls(description, which, model, _tokenizer(description), device)

    def predict(
        self,
        task: str,
        image: Picture | Sequence[Picture] | None = None,
        text: str | Sequence[str] | None = None,
        domain: str | None = None,
        batch_size: int = 32,
    ) -> Any:
        """Answers to inputs, which are prepared as those of the training and test data are.

        Args:
            task: name of the task.
            image: the image, or a list of them, where the task has the modality `image`.
            text: the text, or a list of them, where it has `text`: what the spec's column or template gives.
            domain: domain of the inputs, where the task's data have several.
            batch_size: number of inputs that are computed at once.

        Returns:
            A `ClassAnswer`, `TextAnswer` or `ImageAnswer`; a list of them where a list was given.

        Raises:
            PersonalError: there is no such task or domain, or an input is missing, is too many or cannot be read.
        """
        wanted = self.task(task)
        given = {"image": image, "text": text}
        for modality, value in given.items():
            if (value is None) == (modality in wanted.modalities):
                fault = "needs" if value is None else "takes no"
                raise PersonalError(f"task {task!r} {fault} {modality}: it takes {' and '.join(wanted.modalities)}")
        single = not any(isinstance(value, list | tuple) for value in given.values())
        columns = {name: _listed(value, single) for name, value in given.items() if value is not None}
        sizes = {name: len(column) for name, column in columns.items()}
        if len(set(sizes.values())) > 1:
            raise PersonalError(f"task {task!r} got {sizes['image']} images and {sizes['text']} texts: give as many")
        domain = self._domain(wanted, domain)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise PersonalError(f"batch_size is {batch_size!r}: give a number of inputs, from 1 on")
        answers: list[Answer] = []
        for start in range(0, next(iter(sizes.values())), batch_size):
            part = {name: column[start : start + batch_size] for name, column in columns.items()}
            answers += self._answers(wanted, self._inputs(part, domain, wanted.image))
        return answers[0] if single else answers

    @torch.inference_mode()
    def _answers(self, task: TaskDescription, inputs: dict[str, Any]) -> list[Answer]:
        if task.kind == "text_generation":

            def generate(length: int) -> Tensor:
                return cast(Tensor, self.model(task.name, {**inputs, "target_length": length}))

            longest, end = self.description.settings.model.text_length, self.tokenizer.sep_token_id
            return text_answers(generate, longest, cast(int, end), self.decode)
        output = self.model(task.name, inputs)
        return (
            image_answers(output, inputs, task.image)
            if task.kind == "image_generation"
            else class_answers(output, task.classes)
        )

    def decode(self, ids: list[int]) -> str:
        """Decodes token ids to text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _inputs(self, columns: Mapping[str, Sequence[Any]], domain: str, form: ImageForm) -> dict[str, Any]:
        images = texts = None
        if "image" in columns:
            images = [_pixels(picture, form) for picture in columns["image"]]
        if "text" in columns:
            if wrong := [text for text in columns["text"] if not isinstance(text, str)]:
                raise PersonalError(f"a text is a {type(wrong[0]).__name__}: give a string")
            if not all(text.strip() for text in columns["text"]):
                raise PersonalError("a text is empty: write one")
            length = self.description.settings.model.text_length
            texts = token_ids(columns["text"], self.tokenizer, length, is_target=False)
            if cut := lengths_of_cut(columns["text"], texts, self.tokenizer, length, is_target=False):
                log.warning(
                    "texts have up to %d tokens, and are cut at %d, as in training (%d of them)",
                    max(cut),
                    length,
                    len(cut),
                )
        tensors = input_tensors(images, texts, cast(int, self.tokenizer.pad_token_id))
        return model_inputs(domain, moved_to(tensors, self.device), form)

    def task(self, name: str) -> TaskDescription:
        """The description of a task.

        Raises:
            PersonalError: there is no task of this name.
        """
        if name not in self.tasks:
            raise PersonalError(
                f"client {self.description.client!r} has no task {name!r}: use one of {', '.join(self.tasks)}"
            )
        return self.tasks[name]

    @staticmethod
    def _domain(task: TaskDescription, domain: str | None) -> str:
        if domain is None and len(task.domains) == 1:
            return task.domains[0]
        if domain not in task.domains:
            said = "has several domains" if domain is None else f"has no domain {domain!r}"
            raise PersonalError(f"task {task.name!r} {said}: use one of {', '.join(task.domains)}")
        return domain


def outlined(description: Description, dtype: torch.dtype | None = None) -> TapModel:
    """Builds the model of a description; its trainable tensors have no values yet.

    Args:
        description: description of the client's models.
        dtype: dtype of the frozen weights; without it, that of the run.

    Raises:
        PersonalError: its backbone cannot be used, or is not the one that it was trained with.
    """
    shape = description.settings.model
    dtype = dtype or getattr(torch, description.settings.compute.precision.value)
    try:
        backbone = load_backbone(description.backbone, shape.layers, shape.image_size, description.revision, dtype)
        words = tokenizer_hash(load_tokenizer(locate(description.backbone), description.revision))
        if not same_backbone(found := f"{backbone.fingerprint}-{words}", description.fingerprint):
            raise BackboneError(
                f"backbone {description.backbone!r} has the fingerprint {found}, the models were trained "
                f"with {description.fingerprint}: name the right one in model.json"
            )
        return client_model(backbone, description, shape.text_length)
    except BackboneError as error:
        raise PersonalError(f"client {description.client!r}: {error}") from error


def _tokenizer(description: Description) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(locate(description.backbone), description.revision)
    except BackboneError as error:
        raise PersonalError(f"backbone {description.backbone!r} has no tokenizer: {error}") from error


def _states(folder: Path, description: Description, model: TapModel) -> dict[str, State | None]:
    """Name -> tensors of the client's models as an evaluation would have them; None stands for the run's first values."""
    states = StateFolder(folder, description.run, description.epochs)
    method = find_method(description.settings.method)
    state = states.load() if description.best is None else states.load_best(description.best)
    received, memory = states.load_server(), Memory() if state is None else state.memory

    first = partial(_first, folder, description, model)
    models = {} if received is None else method.models(received, memory, first)
    return {**models, **states.load_models(method.results)}


def _first(folder: Path, description: Description, model: TapModel) -> State:
    """The run's first values: the seed's, but for those that `initial_arrays` named."""
    given = StateFolder(folder, description.run, description.epochs).load_first() or {}
    return {**model.first_values(description.settings.seed), **given}


def _pixels(picture: Picture, form: ImageForm) -> Tensor:
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)):
            raise PersonalError(
                f"an image is an array {picture.shape} of {picture.dtype}: give [height, width, 3] or [height, width], uint8"
            )
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image | str | Path):
        raise PersonalError(f"an image is a {type(picture).__name__}: give a path, a PIL image or a uint8 array")
    try:
        if isinstance(picture, Image.Image):
            return pixels_of(ImageOps.exif_transpose(picture), form)
        return pixels_of(open_image(Path(picture), form.background, form.size), form)
    except Exception as error:  # whatever the decoders of all image formats raise
        if isinstance(picture, Image.Image):
            raise PersonalError(f"an image of mode {picture.mode} cannot be used: {error}") from error
        raise PersonalError(f"image {str(picture)!r} cannot be read: {error}; give a PNG, JPEG or WebP") from error


def _listed(value: Any, single: bool) -> Sequence[Any]:
    if not single and not isinstance(value, list | tuple):
        raise PersonalError("one input is a list and the other is not: give two lists of one length")
    return [value] if single else cast(Sequence[Any], value)
