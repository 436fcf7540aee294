"""Labels as public bug reports have them: each is read as its owner means it, or refused."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.data.people import BLUE, check, csv, folder_of, parquet, picture


def test_folders_in_another_case_are_refused_with_both_lists(tmp_path: Path) -> None:
    picture(tmp_path / "images/Cat/1.png")
    picture(tmp_path / "images/Dog/1.png", BLUE)
    found = check(folder_of(tmp_path), "image_classification", classes=["dog", "cat"])
    assert "has label 'Cat' in row 0" in found.problems
    assert "classes with labels 'dog', 'cat'" in found.problems
    assert "'Cat' and 'cat' differ in case" in found.problems
    named = check(folder_of(tmp_path), "image_classification", classes=["dog", "cat"], labels=["Dog", "Cat"])
    assert (named.problems, named.labels) == ("", ["cat", "dog"])


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ([True, False], ["true", "false"], ["true", "false"]),
        ([True, False], ["True", "False"], ["True", "False"]),
        ([True, False], ["a", "b"], "has label True"),
        (["1", "2"], ["1", "2", "3"], ["1", "2"]),
        ([1, 2], ["1", "2", "3"], ["1", "2"]),
        ([1.0, 2.0], ["1", "2", "3"], ["1", "2"]),
        ([0, 1], ["1", "2", "3"], "has label 0"),
        ([2, 1], ["a", "b"], "list what the data say under `labels`"),
        ([0, 2], ["-1", "0", "x"], "has label 2"),
        ([1, 0], ["a", "b"], ["b", "a"]),
        (["1", "0"], ["a", "b"], ["b", "a"]),
        (["01", "0"], ["a", "b"], "has label '01'"),
        ([1, 2], ["a", "b"], "has label 2"),
        ([None, "a"], ["a", "b"], "has no label"),
        (["a ", "b"], ["a", "b"], "differ in case, blanks"),
        (["cafe\u0301", "b"], ["caf\u00e9", "b"], "differ in case, blanks or Unicode form only"),
        ([float("nan"), 1.0], ["a", "b"], "has no label"),
        ([0.5, 1.0], [0.5, 1.0], ["0.5", "1.0"]),
        (["a", "1"], ["a", "b"], "has label '1' beside names of classes in row 1"),
        (["", "b"], ["a", "b"], "has label ''"),
        ([b"a", b"b"], ["a", "b"], "has label b'a'"),
        ([[1, 0], [0, 1]], ["a", "b"], "has label [1, 0]"),
        (["a\u00a0", "b"], ["a", "b"], "differ in case, blanks"),
        (["None", None], ["None", "b"], "has no label in row 1"),
        (["TRUE", "FALSE"], ["true", "false"], "'TRUE' and 'true' differ in case"),
        ([True, False], ["1", "0"], "has label True"),
        (["1.10", "1.2"], [1.1, 1.2], "'1.10' and '1.1' are one number, which YAML keeps as it is written in quotes"),
        (["+1", "0"], ["a", "b"], "has label '+1'"),
        ([Decimal("1"), Decimal("2")], ["1", "2"], ["1", "2"]),
        ([Decimal("1.00"), Decimal("0.00")], ["a", "b"], ["b", "a"]),
        ([date(2021, 1, 2), date(2021, 1, 1)], [date(2021, 1, 1), date(2021, 1, 2)], ["2021-01-02", "2021-01-01"]),
        ([["a"], ["b"]], ["a", "b"], "has label ['a']"),
    ],
)
def test_labels_are_names_before_they_are_places(labels: Any, classes: Any, expected: Any, tmp_path: Path) -> None:
    found = check(parquet(tmp_path, {"text": ["red", "sky"], "label": labels}), classes=classes)
    if isinstance(expected, str):
        assert expected in found.problems
    else:
        assert (found.problems, found.labels) == ("", expected)
        by_place = not {str(label).removesuffix(".0").lower() for label in labels} <= {
            str(c).removesuffix(".0").lower() for c in classes
        }
        assert ("read as positions in `classes`, counted from 0: '0 is a', '1 is b'" in found.notes) is by_place


def test_booleans_in_a_csv_file_keep_their_case(tmp_path: Path) -> None:
    source = csv(tmp_path, "text,label\nred,True\nsky,False\n")
    assert "'True' and 'true' differ in case" in check(source, classes=["true", "false"]).problems
    assert check(source, classes=["yes", "no"], labels=[True, False]).labels == ["yes", "no"]


@pytest.mark.parametrize("classes", [[True, False], ["SE", False]])
def test_yes_and_no_as_yaml_reads_them_are_no_names(classes: Any, tmp_path: Path) -> None:
    assert "put it in quotes" in check(csv(tmp_path, "text,label\nx,NO\n"), classes=classes).problems


def test_a_class_label_column_counts_by_name(tmp_path: Path) -> None:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"]))
    datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features).save_to_disk(tmp_path / "d")
    source = {"format": "disk", "path": str(tmp_path / "d")}
    assert check(source, classes=["pos", "neg"]).labels == ["pos", "neg"]
    assert "and the data have 'neg', 'pos'" in check(source, classes=["positive", "negative"]).problems
    counted = check(source, classes=2)
    assert (counted.labels, counted.problems) == (["1", "0"], "")
    assert "read as positions" in counted.notes
    written = check(source, "text_generation", columns={"text": "text", "target": "label"})
    assert written.train is not None
    assert [example.found["target"] for example in written.train.examples] == ["pos", "neg"]  # not "1" and "0"


def test_a_class_without_examples_is_a_note(tmp_path: Path) -> None:
    found = check(csv(tmp_path, "text,label\nred,a\nsky,a\n"))
    assert found.problems == ""
    assert "train has no example of class 'b'" in found.notes


def test_classes_that_are_alike_are_a_note(tmp_path: Path) -> None:
    found = check(csv(tmp_path, "text,label\nred,a\nsky,A\nsea, a\n"), classes=["a", "b", "A", " a"])
    assert found.problems == ""
    assert (
        "has the classes 'a', 'A', ' a', which differ in case, blanks or Unicode form only: if they are" in found.notes
    )


def test_a_label_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    assert "names the label '1' twice" in check(csv(tmp_path, "text,label\nx,1\n"), labels=[1, "1"]).problems


def test_files_of_one_pattern_do_not_mix_names_and_places(tmp_path: Path) -> None:
    """`datasets` would make texts of the second file's numbers."""
    for number, label in enumerate(("a", 1)):
        (tmp_path / str(number)).mkdir()
        parquet(tmp_path / str(number), {"text": ["x"], "label": [label]})
    found = check({"format": "parquet", "path": str(tmp_path / "*" / "data.parquet")})
    assert (
        f"column 'label' is int64 in {tmp_path}/1/data.parquet, and string in {tmp_path}/0/data.parq" in found.problems
    )
