"""Folders of images as people have them: what is a class, what is passed over."""

from __future__ import annotations

from pathlib import Path

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
    assert "has 4 files that are passed over: 1 without a suffix, 1 .db, 2 .dcm" in found.notes


def test_images_beside_folders_have_no_class(tmp_path: Path) -> None:
    picture(tmp_path / "images/a/1.png")
    picture(tmp_path / "images/2[1].png", BLUE)
    assert "has label None in row 0" in check(folder_of(tmp_path), "image_classification").problems
    assert check(folder_of(tmp_path), "image_generation").problems == ""


def test_a_metadata_file_names_the_images(tmp_path: Path) -> None:
    picture(tmp_path / "images/1.png")
    (tmp_path / "images/metadata.csv").write_text("file_name,label\n1.png,b\n")
    assert check(folder_of(tmp_path), "image_classification").labels == ["b"]
