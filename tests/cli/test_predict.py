"""`tap-flower predict` and `tap-flower export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from tap_flower.personal.personal_model import PersonalModel
from tests.personal.conftest import run
from tests.personal.test_personal_model import rows

__all__ = ["run"]


PAINT = ["--client", "ann", "--task", "shape_images"]


def test_predict_prints_a_line_for_each_input(command: Any, run: Path) -> None:
    code, out, err = command("predict", str(run), "--client", "bob", "--task", "languages", "gato", "chien", "--json")
    assert (code, err) == (0, "")
    expected = PersonalModel.load(run / "clients" / "bob").predict("languages", text=["gato", "chien"])
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["label"] for line in lines] == [answer.label for answer in expected]
    assert [line["probabilities"] for line in lines] == [answer.probabilities for answer in expected]

    code, out, _ = command("predict", str(run / "clients" / "bob"), "--task", "languages", "--model", "server", "gato")
    answer = PersonalModel.load(run / "clients" / "bob", "server").predict("languages", text="gato")
    assert (code, out) == (0, f"{answer.label} ({answer.probability:.3f})\n")


def test_predict_with_an_image_and_a_text(command: Any, run: Path, tmp_path: Path) -> None:
    row = rows("questions")[0]
    row["image"].save(tmp_path / "shape.png")
    asked = ["--task", "answers", "--image", "shape.png", "--text", row["question"]]
    code, out, _ = command("predict", str(run), "--client", "bob", *asked)
    model = PersonalModel.load(run / "clients" / "bob")
    assert (code, out) == (0, f"{model.predict('answers', row['image'], row['question']).text}\n")


def test_predict_writes_images(command: Any, run: Path, tmp_path: Path) -> None:
    rows("shapes")[0]["image"].save(tmp_path / "shape.png")
    asked = [*PAINT, "shape.png"]
    code, out, _ = command("predict", str(run), *asked, "--out", "made", "--json")
    assert code == 0
    assert json.loads(out).keys() == {"mse", "image"}
    assert Image.open(tmp_path / "made" / "0.png").size == (40, 40)
    code, out, _ = command("predict", str(run), *asked)
    assert out.startswith("mse ")


def test_predict_writes_over_nothing(command: Any, run: Path, tmp_path: Path) -> None:
    image = rows("shapes")[0]["image"]
    for name in ("0.png", "1.png"):
        image.save(tmp_path / name)
    before = (tmp_path / "1.png").read_bytes()
    code, out, err = command("predict", str(run), *PAINT, "0.png", "1.png", "--out", ".")
    assert (code, out) == (1, "")
    assert "0.png is there already: give another folder with --out, or remove it" in err
    assert (tmp_path / "1.png").read_bytes() == before


def test_a_file_of_a_text_is_not_taken_as_the_text(command: Any, run: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("gato")
    code, out, err = command("predict", str(run), "--client", "bob", "--task", "languages", "note.txt")
    assert (code, out) == (1, "")
    assert "text 'note.txt' is a file: give what it holds, \"$(cat note.txt)\" for example" in err


def test_export_writes_a_model_card_with_the_runs_results(command: Any, run: Path, tmp_path: Path) -> None:
    code, out, _ = command("export", str(run), "out", "--client", "ann", "--task", "shapes")
    assert (code, out) == (0, "model 'tap' of client 'ann', task 'shapes', in out\n")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.eval_results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--client", "ann", "--task", "shapes", "x.png", "--out", "y"],
            "--out y: task 'shapes' makes no images, leave --",
        ),
        ([], "has models of several clients: choose one with --client: ann, bob"),
        (["--client", "eve"], "there is no client 'eve': use one of ann, bob"),
        (["--client", "ann"], "the client has several tasks: choose one with --task: shapes, shape_images"),
        (["--client", "ann", "--task", "x"], "there is no task 'x': use one of shapes, shape_images"),
        (["--client", "ann", "--task", "shapes"], "task 'shapes' got no input: give image"),
        (["--client", "bob", "--task", "answers", "x.png"], "takes an image and a text: give them with --image and"),
        (["--client", "ann", "--task", "shapes", "x.png"], "image 'x.png' cannot be read: "),
        (["--client", "ann", "--task", "shapes", "--model", "x", "x.png"], "has no model 'x': use one of server, "),
    ],
)
def test_what_is_wrong_is_told_in_a_line(command: Any, run: Path, arguments: list[str], message: str) -> None:
    code, out, err = command("predict", str(run), *arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err


def test_a_folder_without_models_is_told(command: Any, tmp_path: Path) -> None:
    code, _, err = command("predict", str(tmp_path), "x")
    assert code == 1
    assert (
        "holds no model.json: give a run folder, or a client's own: RUN/clients/NAME, on a node STATE-DIR/NAME" in err
    )


def test_another_clients_folder_is_told(command: Any, run: Path) -> None:
    code, _, err = command("predict", str(run / "clients" / "ann"), "--client", "bob", "x")
    assert code == 1
    assert "is one client's folder, not that of 'bob': leave --client out" in err


def test_the_page_is_served_until_it_is_ended(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Mock()
    served = Mock(return_value=blocks)
    monkeypatch.setattr("tap_flower.personal.demo_page.serve", served)
    status, out, _ = command("demo", "runs/r", "--port", "7999")
    assert status == 0
    assert "to look at: http://127.0.0.1:7999; Ctrl+C ends it" in out
    served.assert_called_once_with(Path("runs/r"), 7999)
    blocks.block_thread.assert_called_once_with()
