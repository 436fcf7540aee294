"""`tap-flower check`: every problem of a client spec at once, with its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from tap_flower.config import client_specs, load_config
from tap_flower.data.check import Problem, check_data
from tap_flower.data.loading import load_client_data
from tap_flower.data.spec import ClientSpec, client_spec, read_spec
from tap_flower.data.text import load_tokenizer
from tap_flower.errors import SpecError
from tap_flower.hub import locate

NOTES = "title,note,urgency\n"
READ = {
    "name": "triage", "kind": "text_classification", "modalities": ["text"], "domain": "notes",
    "classes": ["urgent", "routine"], "columns": {"text": ["title", "note"], "label": "urgency"},
}  # fmt: skip
SEE = {
    "kind": "image_classification", "modalities": ["image"], "domain": "pets", "classes": ["ape", "cat"],
    "columns": {"image": "image", "label": "label"},
}  # fmt: skip
ANSWER = {"name": "answers", "kind": "text_generation", "modalities": ["text"], "domain": "law"}


def checked(spec: ClientSpec, **options: Any) -> tuple[Any, list[str]]:
    summaries, problems = check_data(spec, **{"text_length": 8, "seed": 41, "hold_out": False} | options)
    told = [str(problem) for problem in problems if not problem.is_note]
    return {(found.task, found.split): found for found in summaries}, told


def spec_of(*tasks: dict[str, Any], backbone: str = "demo") -> dict[str, Any]:
    return {"name": "hospital-a", "backbone": backbone, "tasks": list(tasks)}


def good_notes(folder: Path) -> dict[str, Any]:
    (folder / "train.csv").write_text(
        NOTES + "a dog,runs,urgent\nthe law,asks why,routine\nthe red hill,is over the green hill there,urgent\n"
    )
    (folder / "test.csv").write_text(NOTES + "a dog,runs,routine\n")
    return READ | {split: {"format": "csv", "path": str(folder / f"{split}.csv")} for split in ("train", "test")}


def everything_wrong(folder: Path) -> dict[str, Any]:
    """A spec with every problem there is."""
    (folder / "train.csv").write_text(
        NOTES + "a,b,urgent\nc,d,maybe\n,e,urgent\nf,g,maybe\n" + "".join(f"x,y,no{n}\n" for n in range(30))
    )
    blank = datasets.Dataset.from_dict({"title": ["a", " "], "note": ["b", ""], "urgency": ["urgent", "routine"]})
    blank.to_parquet(folder / "blank.parquet")
    triage = READ | {
        "train": {"format": "csv", "path": str(folder / "train.csv")},
        "validation": {"format": "parquet", "path": str(folder / "blank.parquet")},
        "test": {"format": "csv", "path": str(folder / "gone.csv")},
    }

    file = folder / "one.png"
    Image.new("RGB", (20, 10)).save(file)
    good = {"bytes": file.read_bytes(), "path": None}
    bad = {"bytes": file.read_bytes()[:50], "path": None}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "ape"]))
    pictures = {"image": [good, bad, good, {"bytes": b"none", "path": None}], "label": [0, 1, -1, 1]}
    datasets.Dataset.from_dict(pictures, features=features).to_parquet(folder / "pictures.parquet")
    for name in ("ape", "cat", "dog"):
        (folder / "pets" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "pets" / name / "1.png")
    (folder / "pets" / "cat" / "2.png").write_text("no picture")
    pets = SEE | {
        "name": "pets",
        "train": {"format": "parquet", "path": str(folder / "pictures.parquet"), "rows": [0, 9]},
        "test": {"format": "imagefolder", "path": str(folder / "pets")},
    }
    answers = ANSWER | {
        "templates": {"text": "{{ title.nothing }}", "target": "{{ body }}"},
        "train": {"format": "parquet", "path": str(folder / "blank.parquet")},
        "test": {"format": "hub", "name": "owner/none", "split": "test", "revision": "abc"},
    }
    return spec_of(triage, pets, answers, {**READ, "name": "broken", "trian": {}})


def test_every_problem_is_named_with_its_rows(tmp_path: Path) -> None:
    spec, wrong = read_spec(everything_wrong(tmp_path))
    assert [str(problem) for problem in wrong] == [
        "client 'hospital-a': task 'broken' has the unknown key 'trian' (did you mean 'train'?)"
    ]
    assert spec is not None
    summaries, problems = checked(spec)
    where = "client 'hospital-a': task"
    csv, blank, pictures, pets = (
        repr(str(tmp_path / name)) for name in ("train.csv", "blank.parquet", "pictures.parquet", "pets")
    )
    no_label = "but the client spec has 2 classes with labels"
    expected = [
        f"{where} 'triage': train {csv} has no text in row 2 of title, note: fill it, or leave the row out",
        f"{where} 'triage': train {csv} has label 'maybe' in rows 1, 3, {no_label} 'urgent', 'routine'",
        *(f"{where} 'triage': train {csv} has label 'no{n}' in row {n + 4}, {no_label}" for n in range(19)),
        f"{where} 'triage': train {csv} has other problems with its label in rows "
        + ", ".join(str(row) for row in range(23, 34)),
        f"{where} 'triage': validation {blank} has an empty text in row 1",
        f"{where} 'triage': test cannot be read from '{tmp_path}/gone.csv': Unable to find",
        f"{where} 'pets': train {pictures} takes rows 0 to 9 of {pictures}, which has 4: lower them",
        f"{where} 'pets': train {pictures} has no image in rows 1, 3 of column 'image' (row 1: ",
        f"{where} 'pets': train {pictures} has no label in row 2: give it one, or leave the row out",
        f"{where} 'pets': test {pets} has no image in row 2 of column 'image' (row 2: {tmp_path}/pets/",
        f"{where} 'pets': test {pets} has label 'dog' in row 3, {no_label} 'ape', 'cat'",
        f"{where} 'answers': train {blank} has no column 'body' for target: choose among title, note, urgency",
        f"{where} 'answers': train {blank} cannot fill its template in rows 0, 1 (row 0: 'str object' has no attribute",
        f"{where} 'answers': test needs 'owner/none' 'test', which could not be loaded (",
    ]
    assert len(problems) == len(expected)
    for start in expected:
        assert [problem for problem in problems if problem.startswith(start)], (start, problems)
    assert "`hf download owner/none --repo-type dataset --revision abc`" in problems[-1]
    assert summaries["triage", "train"].classes == {
        "urgent": 2,
        "routine": 0,
    }  # reading went on after the first problem
    assert summaries["pets", "train"].images == {(20, 10): 2}
    assert summaries["pets", "test"].images == {(8, 8): 3}


def test_many_rows_are_counted() -> None:
    assert str(Problem("has no text", tuple(range(1020)), " of note")) == (
        f"has no text in rows {', '.join(str(n) for n in range(20))} and 1,000 more of note"
    )


def test_a_good_spec_is_summarised(tmp_path: Path) -> None:
    summaries, problems = checked(client_spec(spec_of(good_notes(tmp_path))))
    assert problems == []
    train, tokenizer = summaries["triage", "train"], load_tokenizer(locate("demo"))
    assert (train.rows, train.classes) == (3, {"urgent": 2, "routine": 1})
    texts = ["a dog runs", "the law asks why", "the red hill is over the green hill there"]
    assert train.tokens == {"text": [len(tokenizer(text)["input_ids"]) for text in texts]}
    assert [example.row for example in train.examples] == [0, 1, 2]
    assert train.examples[0].shown == {"text": "[CLS] a dog runs [SEP]", "label": "0: urgent"}
    cut = tokenizer.decode(tokenizer(texts[2], truncation=True, max_length=8)["input_ids"])
    assert train.examples[2].shown["text"] == cut  # as the model gets it
    assert cut.endswith("[SEP]")


def test_the_examples_are_what_the_client_trains_on() -> None:
    """Whatever the check counts and shows, loading the same spec gives too."""
    spec, *_ = client_specs(load_config("demo"))
    summaries, problems = checked(spec, text_length=40)
    assert problems == []
    loaded = load_client_data(spec, load_tokenizer(locate("demo")), 40, 41, hold_out=False)
    for split in ("train", "test"):
        for task, size in loaded.sizes(split).items():
            found, (part, *_) = summaries[task, split], loaded.splits[split][task]
            assert found.rows == size
            assert [example.row for example in found.examples] == part.dataset.rows[:3]
            assert found.images.total() in (0, size)
            labels = part.dataset.columns.get("label")
            if labels is not None:
                assert list(found.classes.values()) == [labels.count(n) for n in range(len(found.classes))]


def test_too_few_rows(tmp_path: Path) -> None:
    spec = client_spec(spec_of(good_notes(tmp_path)))
    none = client_spec(spec_of(good_notes(tmp_path) | {"train": []}))
    (tmp_path / "train.csv").write_text(NOTES)
    for one, problem in (
        (none, "train has no source: name one"),
        (spec, f"train '{tmp_path}/train.csv' has 0 rows: give it at least 1"),
    ):
        assert f"client 'hospital-a': task 'triage': {problem}" in checked(one, hold_out=True)[1]
        with pytest.raises(SpecError, match=problem):
            load_client_data(one, load_tokenizer(locate("demo")), 8, 41, hold_out=True)


def test_a_template_may_be_the_same_for_all_rows(tmp_path: Path) -> None:
    task = good_notes(tmp_path) | {"columns": {"label": "urgency"}, "templates": {"text": "What is it?"}}
    summaries, problems = checked(client_spec(spec_of(task)))
    assert problems == []
    assert summaries["triage", "train"].examples[2].shown["text"] == "[CLS] what is it? [SEP]"
    loaded = load_client_data(client_spec(spec_of(task)), load_tokenizer(locate("demo")), 8, 41, hold_out=False)
    assert [len(example["text"]) for example in loaded.splits["train"]["triage"][0]] == [7, 7, 7]


def test_a_backbone_without_a_tokenizer_stops_nothing(tmp_path: Path) -> None:
    spec = client_spec(spec_of(good_notes(tmp_path), backbone="no/such"))
    _, (problem, *notes) = check_data(spec, 8, 41, hold_out=False)
    assert str(problem).startswith("backbone 'no/such' gives no tokenizer: ")
    assert all(note.is_note for note in notes)


@pytest.mark.parametrize("column", ["title", "gone"])
def test_inputs_that_cannot_be_read_are_not_shared(column: str, tmp_path: Path) -> None:
    task = good_notes(tmp_path) | {"columns": {"text": column, "label": "urgency"}}
    notes = [str(problem) for problem in check_data(client_spec(spec_of(task)), 8, 41)[1] if problem.is_note]
    assert any("share" in note for note in notes) == (column == "title")


def test_a_spec_without_a_right_task() -> None:
    spec, problems = read_spec(spec_of({**READ, "trian": {}}, {**READ, "kind": "smelling", "train": [], "test": []}))
    assert spec is None
    assert ["trian" in str(problems[0]), "smelling" in str(problems[1]), len(problems)] == [True, True, 2]


def test_problems_of_the_client_hide_none_of_its_tasks() -> None:
    spec, problems = read_spec({**spec_of({**READ, "kind": "smelling", "train": [], "test": []}), "nmae": "a"})
    assert spec is None
    assert ["nmae" in str(problems[0]), "smelling" in str(problems[1]), len(problems)] == [True, True, 2]


def test_rows_that_are_set_aside_are_told(tmp_path: Path) -> None:
    spec = client_spec(spec_of(good_notes(tmp_path)))
    rows = {one.split: one.rows for one in check_data(spec, 8, 41)[0]}["train"]
    told = f"task 'triage': no `validation` source: 1 of {rows} training rows are held out to decide on replacements and are"
    for hold_out in (True, False):
        notes = [str(problem) for problem in check_data(spec, 8, 41, hold_out=hold_out)[1] if problem.is_note]
        assert any(told in note for note in notes) == hold_out


def test_a_part_that_is_far_from_its_share_is_noted(tmp_path: Path) -> None:
    rows = "".join(f"a,b,{'urgent' if n % 2 else 'routine'},{'x' if n < 16 else n}\n" for n in range(20))
    (tmp_path / "notes.csv").write_text(f"title,note,urgency,patient\n{rows}")
    source = {"format": "csv", "path": str(tmp_path / "notes.csv"), "by": ["patient"]}
    parts = {"train": source | {"part": [0, 0.8]}, "test": source | {"part": [0.8, 1]}}
    _, problems = check_data(client_spec(spec_of(READ | parts)), 8, 41, hold_out=False)
    (told,) = (problem for problem in problems if "stay together" in str(problem))
    assert told.is_note
    assert "has 1 of 20 rows; its part, 20%, would be 4: equal values of patient stay together" in str(told)
