"""`tap-flower init`: whatever it writes for data that can be used, `check` accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tap_flower.cli.guess import guessed_task


def pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (9, 9), (number * 7, len(folder.name) * 9, ord(folder.name[0]))).save(folder / f"{number}.png")


def notes(folder: Path) -> Path:
    rows = (f"{n};the patient number {n} is well;{'urgent' if n % 3 else 'routine'}\n" for n in range(60))
    (folder / "notes.csv").write_text("id;note;urgency\n" + "".join(rows))
    return folder / "notes.csv"


def classes_of_images(folder: Path) -> Path:
    for name in ("cat", "dog"):
        pictures(folder / "pets" / name, 30)
    return folder / "pets"


def splits_of_images(folder: Path) -> Path:
    for name in ("train/cat", "train/dog", "test/cat"):
        pictures(folder / "pets" / name, 3)
    return folder / "pets"


def answers(folder: Path) -> Path:
    (folder / "law").mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"{split} {n}?", "answer": f"reply {n}"} for n in range(5)]
        (folder / "law" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "law"


def photographs(folder: Path) -> Path:
    pictures(folder / "photographs", 40)
    return folder / "photographs"


@pytest.mark.parametrize(
    ("make", "kind", "classes"),
    [
        (notes, "text_classification", ["routine", "urgent"]),
        (classes_of_images, "image_classification", ["cat", "dog"]),
        (splits_of_images, "image_classification", ["cat", "dog"]),
        (answers, "text_generation", None),
        (photographs, "image_generation", None),
    ],
)
def test_what_it_writes_is_accepted(make: Any, kind: str, classes: Any, command: Any, tmp_path: Path) -> None:
    code, out, err = command("init", str(make(tmp_path)))
    assert (code, "text_classification" in kind or kind in out) == (0, True), err
    text = (tmp_path / "client.yaml").read_text()
    (task,) = yaml.safe_load(text)["tasks"]
    assert (task["kind"], task.get("classes")) == (kind, classes)
    assert "# clients share a task, and its head, by this name: agree on it with the others" in text
    code, out, err = command("check", "client.yaml")
    assert code == 0, out + err
    code, _, err = command("init", str(tmp_path))
    assert code == 1
    assert "client.yaml is there already" in err


@pytest.mark.parametrize(("written", "guessed"), [("utf-8", None), ("cp1252", "cp1252"), ("utf-16", "utf-16")])
def test_the_encoding_of_a_csv_file_is_guessed_and_named_as_a_guess(
    written: str, guessed: str | None, command: Any, tmp_path: Path
) -> None:
    rows = "".join(f"“café” number {n},{'good' if n % 2 else 'bad'}\n" for n in range(40))
    (tmp_path / "menu.csv").write_bytes(f"text,label\n{rows}".encode(written))
    code, _, err = command("init", "menu.csv")
    assert code == 0, err
    text = (tmp_path / "client.yaml").read_text()
    (task,) = yaml.safe_load(text)["tasks"]
    assert task["train"].get("encoding") == guessed
    assert ("the encoding is a guess" in text) is (guessed is not None)
    code, out, err = command("check", "client.yaml", "--json", "found.json")
    assert code == 0, out + err
    assert (
        "“café” number"
        in json.loads((tmp_path / "found.json").read_text())["tasks"]["menu"]["train"]["examples"][0]["text"]
    )


def test_images_in_a_parquet_file(command: Any, tmp_path: Path) -> None:
    """Their bytes alone, and as `datasets` writes them."""
    pictures(tmp_path / "pets", 40)
    files = [file.read_bytes() for file in sorted((tmp_path / "pets").iterdir())]
    labels = ["ape", "cat"] * 20
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "ape"]))
    whole = {"image": [{"bytes": file, "path": None} for file in files], "label": labels}
    datasets.Dataset.from_dict(whole, features=features).to_parquet(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": files, "label": labels}), tmp_path / "b.parquet")
    for name, classes in (("a", ["cat", "ape"]), ("b", ["ape", "cat"])):
        task = guessed_task(tmp_path / f"{name}.parquet")
        assert (task["kind"], task["classes"]) == ("image_classification", classes)
        assert task["columns"] == {"image": "image", "label": "label"}


def test_a_folder_of_several_tables_is_read_whole_and_by_patients(command: Any, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for part in range(2):
        rows = "".join(f"note {part} {n},patient-{n % 9},{'ill' if n % 3 else 'well'}\n" for n in range(30))
        (tmp_path / "scans" / f"part-{part}.csv").write_text(f"note,patient,finding\n{rows}")
    (tmp_path / "scans" / "codes.json").write_text("[]")
    code, out, err = command("init", "scans")
    assert code == 0, err
    assert "left out: codes.json" in out
    (task,) = yaml.safe_load((tmp_path / "client.yaml").read_text())["tasks"]
    assert (task["name"], task["classes"]) == ("scans", ["ill", "well"])
    assert task["train"] == {
        "format": "csv", "path": str(tmp_path / "scans" / "*.csv"), "part": [0, 0.7], "by": ["patient"]
    }  # fmt: skip
    code, out, err = command("check", "client.yaml")
    assert code == 0, out + err


def test_parts_do_not_overlap(tmp_path: Path) -> None:
    task = guessed_task(notes(tmp_path))
    assert [task[split]["part"] for split in ("train", "validation", "test")] == [[0, 0.7], [0.7, 0.8], [0.8, 1]]
    assert task["train"]["by"] == ["note"]
    assert task["train"]["delimiter"] == ";"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("gone.csv", None, "does not exist"),
        ("x.docx", "x", "is no file that can be read"),
        ("x.csv", "", "Empty CSV file"),
        ("x.csv", "a,b\n", "has no rows"),
        ("x.csv", "a,b\n1,2\n", "write the client spec by hand"),
    ],
)
def test_what_it_cannot_use_is_told(name: str, content: str | None, problem: str, command: Any, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    code, out, err = command("init", name)
    assert code == 1
    assert problem in err
    assert "Traceback" not in out + err


def test_a_name_that_check_would_refuse_is_refused(command: Any, tmp_path: Path) -> None:
    code, _, err = command("init", str(tmp_path), "--name", "klinik a", "--out", str(tmp_path / "client.yaml"))
    assert code == 1
    assert "--name 'klinik a': use letters, digits, '-' and '_', at most 64" in err


def test_a_folder_above_the_one_that_is_split_is_refused(command: Any, tmp_path: Path) -> None:
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        pictures((data := tmp_path / "data") / "pets" / name, 2)
    code, _, err = command("init", "data")
    assert code == 1
    assert f"{data} has no train and test folders, but {data / 'pets'} has: give that folder" in err
    assert not (tmp_path / "client.yaml").exists()


def test_what_it_leaves_out_or_puts_together_is_told(command: Any, tmp_path: Path) -> None:
    shop = tmp_path / "shop"
    pictures(shop / "photographs", 3)
    rows = "".join(f"{n},item number {n},{'tool' if n % 2 else 'toy'},9.5\n" for n in range(40))
    for name in ("orders-train", "orders-test"):
        (shop / f"{name}.csv").write_text(f"id,item,department,price\n{rows}")
    (shop / "prices.json").write_text('[{"item": "saw"}]')
    code, out, err = command("init", "shop")
    assert code == 0, err
    assert "read as train data: orders-train.csv, test data: orders-test.csv" in out
    assert "left out: prices.json" in out
    assert "left out: 3 images, which no column of the table names" in out
    assert "left out: the columns id, price" in out
    (task,) = yaml.safe_load((tmp_path / "client.yaml").read_text())["tasks"]
    assert task["train"]["path"].endswith("orders-train.csv")
    assert task["test"]["path"].endswith("orders-test.csv")

    code, out, err = command("init", "shop/orders-train.csv", "--out", "train.yaml")
    assert code == 0, err
    assert f"orders-train.csv alone is read: if orders-test.csv beside it belongs to it, give {shop} instead" in out

    (shop / "orders-test.csv").rename(shop / "orders-old.csv")
    code, out, err = command("init", "shop", "--out", "one.yaml")
    assert code == 0, err
    assert "read as one table: orders-old.csv, orders-train.csv" in out


def test_a_metadata_file_gives_labels_by_the_rule_of_tables(command: Any, tmp_path: Path) -> None:
    pictures(tmp_path / "scans", 40)
    rows = "".join(f"{n}.png,{'ill' if n % 3 else 'well'},{n % 9},{n}\n" for n in range(40))
    (tmp_path / "scans" / "metadata.csv").write_text(f"file_name,diagnosis,patient,age\n{rows}")
    code, out, err = command("init", "scans")
    assert code == 0, err
    assert "left out: the columns age" in out
    (task,) = yaml.safe_load((tmp_path / "client.yaml").read_text())["tasks"]
    assert (task["kind"], task["classes"]) == ("image_classification", ["ill", "well"])
    assert (task["columns"], task["train"]["by"]) == ({"image": "image", "label": "diagnosis"}, ["patient"])
    code, out, err = command("check", "client.yaml")
    assert code == 0, out + err


def test_an_image_beside_the_folders_of_classes_is_refused(command: Any, tmp_path: Path) -> None:
    pets = classes_of_images(tmp_path)
    Image.new("RGB", (9, 9)).save(pets / "logo.png")
    code, _, err = command("init", "pets")
    assert code == 1
    assert f"{pets} has folders of classes (cat, dog), and 1 image beside them (logo.png): move each into" in err


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (("train.csv", "train_old.csv", "test.csv"), "train.csv", "test.csv"),
        (("train.CSV", "test.csv"), "train.CSV", "test.csv"),
        (("train-00000-of-00002.csv", "train-00001-of-00002.csv", "test-00000-of-00001.csv"),
         "train-*-of-00002*.csv", "test-*-of-00001*.csv"),
    ],
)  # fmt: skip
def test_which_files_are_a_split(names: tuple[str, ...], train: str, test: str, command: Any, tmp_path: Path) -> None:
    (tmp_path / "x[1]").mkdir()
    rows = "".join(f"note number {n},{'ill' if n % 3 else 'well'}\n" for n in range(30))
    for name in names:
        (tmp_path / "x[1]" / name).write_text(f"note,finding\n{name} {rows}")
    code, out, err = command("init", "x[1]", "--name", "7", "--out", "deep/client.yaml")
    assert code == 0, err
    spec = yaml.safe_load((tmp_path / "deep" / "client.yaml").read_text())
    (task,) = spec["tasks"]
    assert (spec["name"], Path(task["train"]["path"]).name, Path(task["test"]["path"]).name) == ("7", train, test)
    code, out, err = command("check", "deep/client.yaml")
    assert code == 0, out + err


def test_folders_beside_the_splits_are_told(command: Any, tmp_path: Path) -> None:
    for name in ("train", "train_old", "test"):
        for kind in ("cat", "dog"):
            pictures(tmp_path / "pets" / name / kind, 2)
    code, out, err = command("init", "pets")
    assert code == 0, err
    assert "read as train data: train, test data: test; left out: train_old" in out
    (task,) = yaml.safe_load((tmp_path / "client.yaml").read_text())["tasks"]
    assert (task["train"]["split"], task["test"]["split"]) == ("train", "test")


@pytest.mark.parametrize("others", [["b.csv", "metadata.csv"], ["b.CSV"]])
def test_a_pattern_that_would_read_other_files_is_refused(others: list[str], command: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.csv", *others):
        (tmp_path / "data" / name).write_text("note,finding\n" + "all is well,ill\nno,well\n" * 9)
    code, _, err = command("init", "data")
    assert code == 1
    assert f"data has the tables a.csv, {others[0]}, but *.csv reads a.csv" in err
    assert "rename or move the others" in err


def test_why_a_column_is_no_label_is_told(command: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("note,rating\n" + "".join(f"note number {n},{n / 7}\n" for n in range(60)))
    code, out, err = command("init", "notes.csv")
    assert code == 1
    assert "has neither a label nor a target in note, rating" in err
    assert "'rating' is not taken as the label: 60 rows have 60 different values in it, and 2 to 30 make classes" in out


def test_quotes_behind_backslashes_are_read(command: Any, tmp_path: Path) -> None:
    rows = "".join(f'"note \\"{n}\\" here",{("urgent", "routine")[n % 2]}\n' for n in range(60))
    (tmp_path / "notes.csv").write_text(f"note,label\n{rows}")
    code, out, err = command("init", "notes.csv")
    assert code == 0, err
    assert "notes.csv is read with `escape: '\\'`: quotes within its texts are written \\\"" in out
    code, out, err = command("check", "client.yaml", "--json", "found.json")
    assert code == 0, out + err
    found = json.loads((tmp_path / "found.json").read_text())["tasks"]["notes"]["train"]["examples"][0]
    assert found["text"] == f'note "{found["row"]}" here'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1,all is well 0,ill\n", "'1', 'ill' in the first line of "),
        ("note,label\nnote 1,Urgent\nnote 2,urgent \n", "'Urgent', 'urgent ' became classes, and differ in case"),
    ],
)
def test_what_looks_like_a_mistake_in_a_table_is_told(text: str, told: str, command: Any, tmp_path: Path) -> None:
    rows = "".join(f"{n},note number {n},{'ill' if n % 3 else 'well'}\n" for n in range(30))
    (tmp_path / "notes.csv").write_text(text + (rows if text.startswith("1") else text.partition("\n")[2] * 9))
    code, out, err = command("init", "notes.csv")
    assert code == 0, err
    assert told in out


def test_a_long_text_is_no_path(command: Any, tmp_path: Path) -> None:
    rows = "".join(f"{'word ' * 80}. {n},{'ill' if n % 3 else 'well'}\n" for n in range(30))
    (tmp_path / "notes.csv").write_text(f"note,label\n{rows}")
    code, _, err = command("init", "notes.csv")
    assert code == 0, err


def test_rows_without_a_patient_are_refused(command: Any, tmp_path: Path) -> None:
    rows = "".join(f"note number {n},{n % 9 or ''},{'ill' if n % 3 else 'well'}\n" for n in range(30))
    (tmp_path / "notes.csv").write_text(f"note,patient,label\n{rows}")
    code, _, err = command("init", "notes.csv")
    assert code == 1
    assert f"{tmp_path}/notes.csv has no value of patient, which `by` names, in rows 0, 9, 18, 27: fill it" in err


def test_a_class_that_looks_like_a_missing_value_is_told(command: Any, tmp_path: Path) -> None:
    rows = "".join(f"note number {n},{('urgent', 'routine')[n % 2] if n else 'NA'}\n" for n in range(60))
    (tmp_path / "notes.csv").write_text(f"note,label\n{rows}")
    code, out, err = command("init", "notes.csv")
    assert code == 0, err
    assert "'NA' became a class: if it stands for a missing value, take it and its rows out" in out
    _, out, _ = command("check", "client.yaml")
    assert "note: client 'client-1': task 'notes': has the class 'NA': if it stands for a missing value" in out
