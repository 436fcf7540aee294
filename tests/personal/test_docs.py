"""What docs/use-personal-models.md does in Python, on a run of the tests."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tap_flower.data.images import pixels_of
from tap_flower.data.loading import model_inputs
from tap_flower.files import read_tensors
from tap_flower.personal.answers import ClassAnswer, TextAnswer
from tap_flower.personal.export import export
from tap_flower.personal.personal_model import PersonalModel
from tests.docs_blocks import ROOT, blocks
from tests.personal.test_personal_model import rows


def output(model: PersonalModel, task: str, domain: str, image: Image.Image, **more: Any) -> Tensor:
    """What the module itself gives for one image."""
    form = model.task(task).image
    inputs = model_inputs(domain, {"image": pixels_of(image, form).unsqueeze(0)}, form)
    with torch.no_grad():
        return model.model(task, {**inputs, **more})[0].cpu()


def text(model: PersonalModel, image: Image.Image, question: str) -> str:
    """The most likely tokens up to the separator, each taken from the module's own logits."""
    tokenizer = model.tokenizer
    asked = torch.tensor([tokenizer(question)["input_ids"]])
    logits = output(model, "answers", "visual_answering", image, input_ids=asked, target_length=16)
    tokens = takewhile(lambda token: token != tokenizer.sep_token_id, logits.argmax(-1).tolist())
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def test_the_pages_python(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clients = run / "clients"
    (tmp_path / "runs" / "demo-seed41" / "clients").mkdir(parents=True)
    (tmp_path / "runs" / "demo-seed41" / "clients" / "client-2").symlink_to(clients / "bob")
    export(clients / "ann", tmp_path / "exported", "shapes")
    first, second = (row["image"] for row in rows("questions")[:2])
    first.save(tmp_path / "shape.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"first": first, "second": second}
    python = [b.text for b in blocks(ROOT / "docs" / "use-personal-models.md") if b.language == "python"]
    assert len(python) == 2

    capsys.readouterr()
    exec(python[0], names)
    model = names["model"]
    assert capsys.readouterr().out == f"{model.tasks}\n"
    assert {name: (task.kind, task.modalities, task.domains) for name, task in model.tasks.items()} == {
        "languages": ("text_classification", ("text",), ("names",)),
        "answers": ("text_generation", ("image", "text"), ("visual_answering",)),
    }
    assert model.tasks["languages"].classes == ("en", "es", "pt", "it", "fr", "de", "id", "tr")
    tensors, _ = read_tensors(clients / "bob" / "tap.safetensors")
    assert all(torch.equal(model.model.get_parameter(name).cpu(), value) for name, value in tensors.items())
    assert names["answer"] == TextAnswer(text(model, first, "what color is the shape?"))
    asked = ((first, "is it red?"), (second, "is it blue?"))
    assert names["answers"] == [TextAnswer(text(model, *each)) for each in asked]

    exec(python[1].replace("digit.png", "shape.png").replace("digits", "shapes"), names)
    answer = names["answer"]
    assert isinstance(answer, ClassAnswer)
    # The export has merged weights: the logits are those of the personal model up to the last bits.
    logits = output(PersonalModel.load(clients / "ann", device="cpu"), "shapes", "shapes", first)
    shares = [float(share) for share in logits.exp() / logits.exp().sum()]
    assert list(answer.probabilities) == [str(number) for number in range(24)]
    assert list(answer.probabilities.values()) == pytest.approx(shares, rel=1e-4)
    assert sum(answer.probabilities.values()) == pytest.approx(1)
    assert answer.label == str(shares.index(max(shares)))
    assert answer.probability == answer.probabilities[answer.label] == max(answer.probabilities.values())
