"""A client's models, used with raw inputs, give what the run's evaluation has found."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tap_flower.data.sources import open_source
from tap_flower.data.spec import Source
from tap_flower.errors import ConfigError, PersonalError, StorageError
from tap_flower.personal.answers import ClassAnswer, ImageAnswer, TextAnswer
from tap_flower.personal.personal_model import PersonalModel

MODELS = ["server", "personal", "server+finetune", "tap"]
TEST_ROWS = 10
SETTINGS: dict[str, Any] = {"method": "tap", "seed": 41, "model": {}, "compute": {}}


def rows(name: str) -> list[dict[str, Any]]:
    """The test rows of the clients, as the data set has them."""
    data = open_source(Source("packaged", name, "test"))
    return [data[row] for row in range(TEST_ROWS)]


def figures(run: Path, client: str, task: str, which: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "results.json").read_text())["clients"][client][task][which]
    return found


@pytest.mark.parametrize("which", MODELS)
def test_images_are_classified_and_reconstructed_as_in_the_evaluation(run: Path, which: str) -> None:
    model = PersonalModel.load(run / "clients" / "ann", which)
    test = rows("shapes")
    answers = model.predict("shapes", image=[row["image"] for row in test], batch_size=4)
    right = [answer.label == str(row["label"]) for answer, row in zip(answers, test, strict=True)]
    assert sum(right) / TEST_ROWS == pytest.approx(figures(run, "ann", "shapes", which)["accuracy"])
    losses = [-np.log(answer.probabilities[str(row["label"])]) for answer, row in zip(answers, test, strict=True)]
    assert np.mean(losses) == pytest.approx(figures(run, "ann", "shapes", which)["loss"], rel=1e-4)
    assert all(answer.probability == max(answer.probabilities.values()) for answer in answers)
    assert all(sum(answer.probabilities.values()) == pytest.approx(1) for answer in answers)

    pictures = model.predict("shape_images", image=[row["image"] for row in test])
    assert np.mean([answer.mse for answer in pictures]) == pytest.approx(
        figures(run, "ann", "shape_images", which)["mse"], rel=1e-4
    )
    assert pictures[0].image.size == (40, 40)


@pytest.mark.parametrize("which", MODELS)
def test_texts_are_classified_and_answered_as_in_the_evaluation(run: Path, which: str) -> None:
    model = PersonalModel.load(run / "clients" / "bob", which)
    test = rows("names")
    answers = model.predict("languages", text=[row["text"] for row in test])
    losses = [-np.log(list(a.probabilities.values())[row["label"]]) for a, row in zip(answers, test, strict=True)]
    assert np.mean(losses) == pytest.approx(figures(run, "bob", "languages", which)["loss"], rel=1e-4)
    classes = list(answers[0].probabilities)
    right = [classes.index(answer.label) == row["label"] for answer, row in zip(answers, test, strict=True)]
    assert np.mean(right) == pytest.approx(figures(run, "bob", "languages", which)["accuracy"])

    test = rows("questions")
    texts = model.predict(
        "answers", image=[row["image"] for row in test], text=[row["question"] for row in test], batch_size=3
    )
    right = [answer.text == row["answer"] for answer, row in zip(texts, test, strict=True)]
    assert np.mean(right) == pytest.approx(figures(run, "bob", "answers", which)["exact_match"])


def test_the_answers_in_the_report_are_those_of_the_model(run: Path) -> None:
    """The evaluation cuts a text where its target ends; a prediction goes on to its separator."""
    shown = json.loads((run / "clients" / "bob" / "examples.json").read_text())["tasks"]["answers"]["items"]
    model = PersonalModel.load(run / "clients" / "bob")
    assert model.which == "tap"
    test = rows("questions")[: len(shown)]
    answers = model.predict("answers", image=[r["image"] for r in test], text=[r["question"] for r in test])
    for answer, item in zip(answers, shown, strict=True):
        assert answer.text.startswith(item["answers"]["tap"]["text"])


def test_one_input_gives_one_answer_whatever_form_it_has(run: Path, tmp_path: Path) -> None:
    ann, bob = (PersonalModel.load(str(run / "clients" / name)) for name in ("ann", "bob"))
    image = rows("shapes")[0]["image"].convert("RGB")
    image.save(tmp_path / "shape.png")
    forms = [image, np.asarray(image), tmp_path / "shape.png", str(tmp_path / "shape.png")]
    answers = [ann.predict("shapes", image=form) for form in forms]
    assert isinstance(answers[0], ClassAnswer)
    assert all(answer == answers[0] for answer in answers)
    assert isinstance(ann.predict("shape_images", image), ImageAnswer)
    assert isinstance(bob.predict("answers", image, "what is it?"), TextAnswer)
    listed = bob.predict("languages", text=["gato"])
    single = bob.predict("languages", text="gato")
    assert [answer.label for answer in listed] == [single.label]
    assert ann.predict("shapes", image=[]) == []


def test_a_photograph_is_turned_as_its_camera_says(run: Path, tmp_path: Path) -> None:
    """As `datasets` decodes images; orientation 6 in EXIF: the camera was held upright."""
    model = PersonalModel.load(run / "clients" / "ann")
    image = rows("shapes")[0]["image"].convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert model.predict("shapes", tmp_path / "turned.png") == model.predict("shapes", image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "shape", "image": "x.png"}, "client 'ann' has no task 'shape': use one of shapes, shape_images"),
        ({"task": "shapes"}, "task 'shapes' needs image: it takes image"),
        ({"task": "shapes", "image": "x.png", "text": "x"}, "task 'shapes' takes no text: it takes image"),
        ({"task": "shapes", "image": "/none/x.png"}, "image '/none/x.png' cannot be read: .*No such file"),
        ({"task": "shapes", "image": __file__}, "cannot be read: .*give a PNG, JPEG or WebP"),
        ({"task": "shapes", "image": np.zeros((4, 4))}, r"an array \(4, 4\) of float64: give .* uint8"),
        (
            {"task": "shapes", "image": Image.new("I", (8, 8))},
            "an image of mode I cannot be used: it has whole numbers",
        ),
        ({"task": "shapes", "image": Image.new("F", (8, 8), 7.0)}, "an image of mode F cannot be used: it has 32-bit"),
        ({"task": "shapes", "image": "x.png", "domain": "y"}, "has no domain 'y': use one of shapes"),
        ({"task": "shapes", "image": "x.png", "batch_size": 0}, "batch_size is 0: give a number of inputs, from 1 on"),
        (
            {"task": "shapes", "image": torch.zeros(3, 8, 8)},
            "an image is a Tensor: give a path, a PIL image or a uint8",
        ),
        ({"task": "shapes", "image": b"PNG"}, "an image is a bytes: give a path, a PIL image or a uint8 array"),
    ],
)
def test_what_it_cannot_do_is_told(run: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PersonalError, match=message):
        PersonalModel.load(run / "clients" / "ann").predict(**arguments)


def test_lists_must_go_together(run: Path) -> None:
    model, image = PersonalModel.load(run / "clients" / "bob"), Image.new("RGB", (64, 64))
    with pytest.raises(PersonalError, match="got 1 images and 2 texts: give as many"):
        model.predict("answers", [image], ["a", "b"])
    with pytest.raises(PersonalError, match="give two lists of one length"):
        model.predict("answers", image, ["a", "b"])
    with pytest.raises(PersonalError, match="a text is a int: give a string"):
        model.predict("languages", text=["a", 3])  # type: ignore[list-item]
    with pytest.raises(PersonalError, match="a text is empty: write one"):
        model.predict("languages", text=["a", " "])


def test_a_text_that_is_cut_is_told(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = PersonalModel.load(run / "clients" / "bob")
    caplog.clear()
    model.predict("languages", text=["gato", "gato " * 99])
    (told,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"texts have up to \d{3} tokens, and are cut at 40, as in training \(1 of them\)", told)


@pytest.fixture
def bob(run: Path, tmp_path: Path) -> Path:
    """A copy of a client's folder."""
    return Path(shutil.copytree(run / "clients" / "bob", tmp_path / "bob"))


def test_before_stage_2_the_clients_own_model_is_taken(bob: Path) -> None:
    for name in ("tap", "server+finetune"):
        (bob / f"{name}.safetensors").unlink()
    assert PersonalModel.load(bob).which == "personal"
    with pytest.raises(PersonalError, match="has no model 'tap': use one of server, personal$"):
        PersonalModel.load(bob, "tap")


def test_a_client_that_took_part_in_no_round_has_the_runs_initial_values(bob: Path) -> None:
    for file in bob.glob("personal*"):
        file.unlink()
    model = PersonalModel.load(bob, "personal").model
    assert bool((model.get_parameter("components.mote/block/text.0.query.B") == 0).all())


def test_a_folder_without_models_is_told(bob: Path) -> None:
    for file in bob.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(StorageError, match=r"holds no model yet, or server.safetensors is damaged"):
        PersonalModel.load(bob)
    (bob / "model.json").unlink()
    with pytest.raises(StorageError, match=r"model.json cannot be read: No such file"):
        PersonalModel.load(bob)


def change(folder: Path, **values: Any) -> None:
    file = folder / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema": 1}, r"model.json has schema 1, not 2: use the version that wrote it"),
        ({"client": "../x"}, r"model.json is damaged: Expected `str` matching regex .* at `\$.client`"),
        ({"run": 3}, r"model.json is damaged: Expected `str`, got `int` - at `\$.run`"),
        ({"more": 3}, r"damaged: Object contains unknown field `more`"),
        ({"tasks": []}, r"Expected `array` of length >= 1 - at `\$.tasks`"),
        ({"settings": {**SETTINGS, "model": {"text_length": 10**9}}}, r"model.text_length = 1000000000 is out of"),
        ({"settings": {**SETTINGS, "method": "none"}}, r"model.json: unknown method 'none'.* install the package"),
        ({"settings": {"method": "tap"}}, r"missing required field `seed` - at `\$.settings`"),
        ({"run": "other"}, r"belongs to run \w+, not other"),
    ],
)
def test_a_description_that_was_tampered_with_is_refused(bob: Path, values: dict[str, Any], message: str) -> None:
    change(bob, **values)
    with pytest.raises((StorageError, ConfigError), match=message):
        PersonalModel.load(bob)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "telepathy"}, "has kind 'telepathy': use one of"),
        ({"modalities": ["smell"]}, r"has modalities \['smell'\]: use one or both of image, text"),
        ({"domains": []}, r"Expected `array` of length >= 1 - at `\$.tasks\[0\].domains`"),
        ({"domains": ["a b"]}, r"Expected `str` matching regex .* at `\$.tasks\[0\].domains\[0\]`"),
        ({"classes": ["en"]}, "has 1 classes: list the names of at least two"),
        ({"classes": ["en"] * 8}, "names the class 'en' twice"),
        ({"classes": ["en", "es"]}, "model 'tap' is not what model.json says: tensor 'components.head/languages"),
    ],
)
def test_so_is_a_task_of_it(bob: Path, values: dict[str, Any], message: str) -> None:
    tasks = json.loads((bob / "model.json").read_text())["tasks"]
    change(bob, tasks=[{**tasks[0], **values}, *tasks[1:]])
    with pytest.raises(StorageError, match=message):
        PersonalModel.load(bob)


def test_another_backbone_is_refused(bob: Path) -> None:
    weights, _, words = json.loads((bob / "model.json").read_text())["fingerprint"].partition("-")
    change(bob, fingerprint=weights)  # as written before tokenizers were compared
    PersonalModel.load(bob)
    change(bob, fingerprint=f"{weights}-{'0' * len(words)}")
    with pytest.raises(PersonalError, match="client 'bob': backbone 'demo' has the fingerprint"):
        PersonalModel.load(bob)
    change(bob, fingerprint="0" * 16)
    with pytest.raises(PersonalError, match="client 'bob': backbone 'demo' has the fingerprint"):
        PersonalModel.load(bob)
    change(bob, backbone="/none")
    with pytest.raises(PersonalError, match="client 'bob': there is no folder /none"):
        PersonalModel.load(bob)


def test_the_description_names_no_data(run: Path) -> None:
    text = (run / "clients" / "bob" / "model.json").read_text()
    assert not {"train", "test", "columns", "path"} & set(json.loads(text)["tasks"][0])
    assert str(run) not in text
