"""Folders of images as people have them: what is a class, what is passed over."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.people import BLUE, check, folder_of, picture


def test_split_words_in_file_names_are_no_splits(tmp_path: Path) -> None:
    for name in ("1", "train_3", "test-4"):
        picture(tmp_path / f"images/a/{name}.png")
    picture(tmp_path / "images/b/val.png", BLUE)
    found = check(folder_of(tmp_path), "image_classification")
    assert found.train is not None
    assert found.train.classes == {"a": 3, "b": 1}


def test_a_client_with_one_class(tmp_path: Path) -> None:
    picture(tmp_path / "images/a/1.png")
    picture(tmp_path / "images/a/2.png", BLUE)
    found = check(folder_of(tmp_path), "image_classification")
    assert found.train is not None
    assert (found.problems, found.train.classes) == ("", {"a": 2, "b": 0})


def test_classes_named_like_splits(tmp_path: Path) -> None:
    for name in ("train/1", "train/2", "blood-test/1"):
        picture(tmp_path / f"images/{name}.png")
    found = check(folder_of(tmp_path), "image_classification", classes=["train", "blood-test"])
    assert found.train is not None
    assert found.train.classes == {"train": 2, "blood-test": 1}


def test_folders_of_splits_without_a_split_are_not_mixed(tmp_path: Path) -> None:
    for name in ("train/a/1", "train/b/1", "test/a/1"):
        picture(tmp_path / f"images/{name}.png")
    assert "has label 'test' in row 0" in check(folder_of(tmp_path), "image_classification").problems
    train = check(folder_of(tmp_path, split="train"), "image_classification")
    assert train.train is not None
    assert train.train.classes == {"a": 1, "b": 1}
    assert (
        "has no folder 'val': use one of test, train"
        in check(folder_of(tmp_path, split="val"), "image_classification").problems
    )


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    picture(tmp_path / "images/a/1.PNG")
    for name in ("2.dcm", "3.dcm", "Thumbs.db", "README"):
        (tmp_path / "images/a" / name).write_text("x")
    found = check(folder_of(tmp_path), "image_classification")
    assert "has 4 files that are passed over: 1 .db, 2 .dcm, 1 without a suffix" in found.notes


def test_images_beside_folders_have_no_class(tmp_path: Path) -> None:
    picture(tmp_path / "images/a/1.png")
    picture(tmp_path / "images/2[1].png", BLUE)
    assert "has no label in row 0" in check(folder_of(tmp_path), "image_classification").problems
    assert check(folder_of(tmp_path), "image_generation").problems == ""


def test_a_metadata_file_names_the_images(tmp_path: Path) -> None:
    picture(tmp_path / "images/1.png")
    (tmp_path / "images/metadata.csv").write_text("file_name,label\n1.png,b\n")
    assert check(folder_of(tmp_path), "image_classification").labels == ["b"]


def test_a_metadata_file_in_a_folder_whose_name_is_a_pattern(tmp_path: Path) -> None:
    picture(tmp_path / "g[1]/images/1.png")
    pq.write_table(pa.table({"file_name": ["1.png"], "label": ["b"]}), tmp_path / "g[1]/images/metadata.parquet")
    assert check(folder_of(tmp_path / "g[1]"), "image_classification").labels == ["b"]


def test_hidden_files_and_folders_are_passed_over_and_counted(tmp_path: Path) -> None:
    for name in ("a/1", "a/.ipynb_checkpoints/1-checkpoint", ".thumbs/1", "a/._1"):
        picture(tmp_path / f"images/{name}.png")
    found = check(folder_of(tmp_path), "image_classification")
    assert found.train is not None
    assert found.train.classes == {"a": 1, "b": 0}
    assert "has 3 files that are passed over: 3 hidden" in found.notes


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path: Path) -> None:
    picture(tmp_path / "store/1.png")
    (tmp_path / "images/b").mkdir(parents=True)
    (tmp_path / "images/a").symlink_to(tmp_path / "store")
    (tmp_path / "images/b/2.png").symlink_to(tmp_path / "store/1.png")
    found = check(folder_of(tmp_path), "image_classification")
    assert found.train is not None
    assert (found.problems, found.train.classes) == ("", {"a": 1, "b": 1})
    (tmp_path / "loop/a").mkdir(parents=True)
    picture(tmp_path / "loop/a/1.png")
    (tmp_path / "loop/a/again").symlink_to(tmp_path / "loop")
    problems = check({"format": "imagefolder", "path": str(tmp_path / "loop")}, "image_classification").problems
    assert f"{tmp_path}/loop/a/again and {tmp_path}/loop are one folder: remove the link" in problems


def test_a_folder_without_an_image_that_can_be_read_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/1.heic").write_text("x")
    assert (
        "holds no images, but files that are none: 1 .heic" in check(folder_of(tmp_path), "image_generation").problems
    )


def test_a_name_that_is_no_text_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "images/a/1.png")
    (tmp_path / "images/a/1.png").rename(os.fsdecode(os.fsencode(tmp_path / "images/a") + b"/\xff.png"))
    problems = check(folder_of(tmp_path), "image_generation").problems
    assert f"{tmp_path}/images/a holds a file named '\\udcff.png': rename it" in problems


@pytest.mark.parametrize(
    ("files", "problem", "note"),
    [
        ({"metadata.csv": "file_name,label\n1.png,a\n"}, "", "1 that the metadata file does not name"),
        ({"metadata.csv": "file_name,label\n./1.png,a\n2.png,b\n"}, "", ""),
        ({"metadata.csv": "file_name,label\n1.png,a\n3.png,b\n"}, "has no image in row 1", ""),
        ({"metadata.csv": "name,label\n1.png,a\n"}, "has no column 'file_name'", ""),
        ({"metadata.csv": "file_name,image,label\n1.png,x,a\n"}, "has a column 'image', which is the images' own", ""),
        ({"metadata.csv": "file_name\n", "metadata.jsonl": "{}"}, "has metadata.csv and metadata.jsonl: keep one", ""),
        ({"x/metadata.csv": "file_name\n"}, "has no label", "has 1 files that are passed over: 1 .csv"),
    ],
)
def test_metadata_files(files: dict[str, str], problem: str, note: str, tmp_path: Path) -> None:
    for name in ("1", "2"):
        picture(tmp_path / f"images/{name}.png")
    for name, text in files.items():
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_text(text)
    found = check(folder_of(tmp_path), "image_classification")
    assert problem in found.problems
    assert bool(problem) == bool(found.problems)
    assert note in found.notes
    assert bool(note) is ("passed over" in found.notes) or problem
