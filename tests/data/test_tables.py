"""CSV, JSON and Parquet files as people have them, parts of them, and files that are none."""

from __future__ import annotations

import gzip
import os
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tap_flower.data.sources import rows_of
from tap_flower.data.spec import Source
from tap_flower.data.tables import csv_table, parquet_table
from tests.data.people import check, csv, json_, parquet


def test_texts_are_as_they_are_written(tmp_path: Path) -> None:
    rows = "00123,a\n3.10,a\n2021-01-01,b\n"
    assert check(csv(tmp_path, f"text,label\n{rows}")).texts == ["00123", "3.10", "2021-01-01"]
    lines = [{"text": text, "label": "a"} for text in ("2021-01-01", "2022-02-02", "1e5")]
    assert check(json_(tmp_path, *lines)).texts == ["2021-01-01", "2022-02-02", "1e5"]


def test_no_word_stands_for_a_missing_value_unless_asked(tmp_path: Path) -> None:
    text = "text,label\nred,NA\nnull,EU\nNaN,NA\n"
    found = check(csv(tmp_path, text), classes=["EU", "NA"])
    assert (found.problems, found.texts, found.labels) == ("", ["red", "null", "NaN"], ["NA", "EU", "NA"])
    assert "has no text in row 1" in check(csv(tmp_path, text, missing=["null"]), classes=["EU", "NA"]).problems


@pytest.mark.parametrize(
    ("text", "encoding", "more", "problem"),
    [
        ("text,label\nrouge é,a\n", "latin-1", {}, "is not valid UTF-8: set `encoding`, for example latin-1"),
        ("text,label\nrouge é,a\n", "latin-1", {"encoding": "latin-1"}, ""),
        ("text,label\nrouge é,a\n", "utf-8-sig", {}, ""),
        ("text,label\nrouge é,a\n", "utf-16", {"encoding": "utf-16"}, ""),
        ("text;label\nrouge é;a\n", "utf-8", {}, "has no column 'text' for text: choose among text;label"),
        ("text;label\nrouge é;a\n", "utf-8", {"delimiter": ";"}, ""),
        ("text,label\nrouge é,a,b\n", "utf-8", {}, "has 3 fields and its header 2, with the delimiter"),
        ('text,label\n"rouge é,a\nx,b\n', "utf-8", {}, "line 2 of "),
        ("text,text,label\nrouge é,x,a\n", "utf-8", {}, "has two columns 'text'"),
        ("", "utf-8", {}, "Empty CSV file"),
        ("text,label\n", "utf-8", {}, "has 0 rows: give it at least 1"),
        ("text,label\nx,a\ny,b,c\n", "utf-8", {}, "line 3 of "),
        ("text;label\r\nrouge é;a\r\n", "utf-8-sig", {"delimiter": ";"}, ""),
        ("text,label\rrouge é,a\r", "utf-8", {}, ""),
        ("text,label\n\nrouge é,a\n\n\n", "utf-8", {}, ""),
        (",text,label\n0,rouge é,a\n", "utf-8", {}, ""),
        ("text, label\nx, a\n", "utf-8", {}, "has no column 'label' for label: choose among text, ' label'"),
        ("text,label\nx,a\n", "utf-16", {}, "is UTF-16: set `encoding: utf-16`"),
        ("text,label\nx,a\n", "utf-8", {"encoding": "base64"}, "has encoding 'base64': give one that Python knows"),
        ("text,label\nx,a\n", "utf-8", {"delimiter": "§"}, "has delimiter '§': give one character of ASCII"),
        ("text,label\nx,a\n", "utf-8", {"delimiter": '"'}, "has delimiter '\"': give one character of ASCII"),
        ("text,label\n'rouge é',a\n", "utf-8", {"quote": "'"}, ""),
        ("text,label\nx,a\n", "utf-8", {"quote": "''"}, "has quote \"''\": give one character of ASCII, or ''"),
        ("text,label\nx,a\n", "utf-8", {"quote": ","}, "has quote ',': give one character"),
        ("text,label\nx,a\n", "utf-8", {"escape": '"'}, "has escape '\"': give one character of ASCII"),
        (
            "text,label\nx,a\n",
            "utf-16-le",
            {},
            "holds zero bytes: unpack it, or if it is UTF-16, set `encoding: utf-16-le`",
        ),
        ("text,label\nx,a\n", "utf-8", {"encoding": "utf-9"}, "has encoding 'utf-9': give one that Python knows"),
        ("text,label\nx,a\n", "utf-8", {"delimiter": "::"}, "has delimiter '::': give one character"),
    ],
)
def test_csv_files(text: str, encoding: str, more: Any, problem: str, tmp_path: Path) -> None:
    found = check(csv(tmp_path, text, encoding, **more))
    if problem:
        assert problem in found.problems
    else:
        assert (found.problems, found.texts) == ("", ["rouge é"])


def test_rows_that_a_quote_joins_are_told(tmp_path: Path) -> None:
    found = check(csv(tmp_path, 'text,label\n"5 inch,a\nsaw,b\n8 inch",a\n"two\nlines",b\n'))
    assert 'has a value that spans lines and may hold whole rows in row 0: if a " opens it' in found.notes
    assert found.texts == ["5 inch,a\nsaw,b\n8 inch", "two\nlines"]
    found = check(csv(tmp_path, 'text,label\n"5 inch,a\nsaw,b\n"8 inch,a\ntwo,b\n', quote=""))
    assert (found.texts, found.labels) == (['"5 inch', "saw", '"8 inch'], ["a", "b", "a"])
    assert "spans lines" not in found.notes


SPARK = 'text,label\n"he said \\"no\\" twice",a\n"a ""b"", c:\\\\",b\n'


@pytest.mark.parametrize(
    ("text", "more", "found"),
    [
        (SPARK, {}, "line 2 of DATA has text behind a closing quote ("),
        (
            SPARK,
            {},
            "if quotes within texts are written \\\", set `escape: '\\'`; if no field is quoted, set `quote: ''`; else",
        ),
        (SPARK, {"escape": "\\"}, ['he said "no" twice', 'a "b", c:\\']),
        (
            'text,label\nx,a\r\n"12" screen",a\n',
            {},
            'line 3 of DATA has text behind a closing quote (\'"12" screen",a\'): if',
        ),
        (
            'text,label\n"5 inch,a\nsaw,b\n"8 inch,a\n',
            {},
            "line 2 of DATA has text behind a closing quote ('\"5 inch,a'): if",
        ),
        ('text,label\n"12" screen",a\n', {"quote": ""}, ['"12" screen"']),
        ('text,label\nx,a\n"y,a\nz,b\n', {}, "line 3 of DATA has a quote that is never closed ('\"y,a')"),
        (
            "text,label\nx,a\nc:\\temp,a\n",
            {"escape": "\\"},
            "line 3 of DATA has '\\\\t', of which \\ would be dropped: write",
        ),
        ("text,label\nx\\, y,a\n", {"escape": "\\"}, ["x, y"]),
    ],
)
def test_quotes_and_escapes_that_would_be_read_otherwise(text: str, more: Any, found: Any, tmp_path: Path) -> None:
    told = check(csv(tmp_path, text, **more))
    if isinstance(found, list):
        assert (told.problems, told.texts) == ("", found)
    else:
        assert found.replace("DATA", str(tmp_path / "data.csv")) in told.problems


def test_a_blank_before_a_quote_is_told(tmp_path: Path) -> None:
    found = check(csv(tmp_path, 'label,text\na, "one"\na,"two"\na, three "3" or four\n'))
    assert found.texts == [' "one"', "two", ' three "3" or four']
    assert 'has a quoted value behind a blank in row 0: the blank and each " are part of it' in found.notes


def test_compressed_json_is_read_as_compressed_csv_is(tmp_path: Path) -> None:
    for name, text in (("x.jsonl.gz", '{"text": "x", "label": "a"}'), ("x.csv.gz", "text,label\nx,a\n")):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        assert check({"format": name.split(".")[1].rstrip("l"), "path": str(tmp_path / name)}).texts == ["x"]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (['{"text": "x", "text": "y", "label": "a"}'], "the key 'text' stands twice"),
        ([{"text": "x", "label": "a"}, {"text": 5, "label": "a"}], "column 'text' holds values of several types"),
        ([{"text": "x", "label": "a"}, '{"text": '], "object 1: "),
        (['"text"'], "it is a str; write a list of objects"),
        ([{"text": {"de": "x"}, "label": "a"}], "has a dict as text in row 0"),
        ([{"label": "a"}, {"label": "b", "text": "x"}], "has no text in row 0"),
        ([{"text": "x"}, {"label": "b", "text": "x"}], "has no label in row 0"),
        (['{"text": NaN, "label": "a"}'], "has no text in row 0"),
        (
            ['{"text": "\\ud800", "label": "a"}'],
            "column 'text' holds an unpaired surrogate (half of a UTF-16 character)",
        ),
        ([{"text": 10**30, "label": "a"}], "column 'text' holds a whole number outside the signed 64-bit range"),
        ([{"text": "x", "label": True}, {"text": "y", "label": 1}], "column 'label' holds values of several types"),
        (['[{"text": "x", "label": "a"},]'], "write a list of objects, or one object a line"),
        (["[]"], "it holds no rows"),
        ([""], "it holds no rows"),
    ],
)
def test_json_files(rows: Any, problem: str, tmp_path: Path) -> None:
    assert problem in check(json_(tmp_path, *rows)).problems


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        ({"text": pa.array(["x"]).dictionary_encode()}, ["x"]),
        ({"text": pa.array(["x"], pa.large_string())}, ["x"]),
        ({"text": [Decimal("1.50")]}, ["1.50"]),
        ({"text": [datetime(2021, 1, 2, 3)]}, ["2021-01-02 03:00:00"]),
        ({"text": [["x", "y"]]}, "has a list as text in row 0"),
        ({"text": [b"x"]}, "has a bytes as text in row 0"),
        ({"text": [timedelta(1)]}, "has a timedelta as text in row 0"),
        ({"text": pa.array([], pa.string())}, "it holds no rows"),
    ],
)
def test_parquet_columns(columns: dict[str, Any], texts: Any, tmp_path: Path) -> None:
    labels = pa.array(["a"] * len(columns["text"]), pa.string()).dictionary_encode()
    found = check(parquet(tmp_path, columns | {"label": labels}))
    if isinstance(texts, str):
        assert texts in found.problems
    else:
        assert (found.problems, found.texts, found.labels) == ("", texts, ["a"])


def test_parquet_files_without_rows_are_left_out_and_columns_of_one_name_refused(tmp_path: Path) -> None:
    for number in range(3):
        count = number % 2
        pq.write_table(pa.table({"text": ["x"] * count, "label": ["a"] * count}), tmp_path / f"{number}.parquet")
    assert check({"format": "parquet", "path": str(tmp_path / "*.parquet")}).texts == ["x"]
    pq.write_table(pa.table([["x"], ["a"], ["b"]], names=["text", "label", "label"]), tmp_path / "double.parquet")
    found = check({"format": "parquet", "path": str(tmp_path / "double.parquet")})
    assert "has two columns 'label': give each its own name" in found.problems


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"text": ["x"], "label": pa.array([None], pa.null()), "age": [2]}, ""),
        ({"label": ["b"], "age": pa.array([3], pa.int8()), "text": pa.array(["x"], pa.large_string())}, ""),
        (
            {"text": ["x"], "label": ["b"], "age": [2.5]},
            "column 'age' is double in DATA/1.parquet, and int64 in DATA/0",
        ),
        (
            {"text": [3], "label": ["b"], "age": [2]},
            "column 'text' is int64 in DATA/1.parquet, and string in DATA/0.parquet:",
        ),
        (
            {"text": ["x"], "label": ["b"]},
            "DATA/1.parquet has the columns text, label, and DATA/0.parquet text, label, age",
        ),
    ],
)
def test_parquet_files_of_other_columns_are_refused(other: dict[str, Any], problem: str, tmp_path: Path) -> None:
    for number, columns in enumerate(({"text": ["y"], "label": ["a"], "age": [1]}, other)):
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    found = check({"format": "parquet", "path": str(tmp_path / "*.parquet")}, labels=["a", "b"])
    assert problem.replace("DATA", str(tmp_path)) in found.problems
    assert ("cannot be read" in found.problems) == bool(problem)


def test_a_parquet_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    for text in ("old", "renewed"):
        source = parquet(tmp_path, {"text": [text]})
        os.utime(source["path"], (1_700_000_000, 1_700_000_000))
        assert parquet_table([source["path"]])["text"][:] == [text]


def test_a_text_of_megabytes_and_with_line_breaks(tmp_path: Path) -> None:
    long = "word " * 300_000
    source = csv(tmp_path, f'text,label\n"{long}",a\n"one\ntwo, ""q""",b\n')
    assert csv_table([source["path"]])["text"][:] == [long, 'one\ntwo, "q"']


def test_a_template_over_a_missing_value_names_its_row(tmp_path: Path) -> None:
    source = csv(tmp_path, "q,ctx,label\nwhy,,a\nhow,paper,b\n")
    template = "{{ q }} context: {{ ctx }}"
    for told in (
        {"columns": {"text": {"template": template}, "label": "label"}},
        {"columns": {"label": "label"}, "templates": {"text": template}},
    ):
        assert "has no value for its template in row 0 of ctx" in check(source, **told).problems
    cared_for = {"columns": {"label": "label"}, "templates": {"text": "{{ q }} context: {{ ctx | default('none') }}"}}
    assert check(source, **cared_for).texts == ["why context: none", "how context: paper"]
    inside = parquet(tmp_path, {"doc": [{"note": None}, {"note": "x"}], "label": ["a", "b"]})
    assert (
        "doc.note has no value"
        in check(inside, columns={"label": "label"}, templates={"text": "{{ doc.note }}"}).problems
    )
    listed = check(inside, columns={"label": "label"}, templates={"text": "{{ doc }}"})
    assert "a dict is no text" in listed.problems


def test_a_file_is_found_by_its_name_and_not_as_a_pattern(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"], "label": ["a"]}), tmp_path / "data[1].parquet")
    assert check({"format": "parquet", "path": str(tmp_path / "data[1].parquet")}).texts == ["x"]


def test_the_readers_own_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.parquet").write_text("no parquet")
    source = {"format": "parquet", "path": str(tmp_path / "data.parquet")}
    found = check(source)
    assert "Parquet" in found.problems
    assert "An error occurred" not in found.problems
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "more").mkdir()
    told = check(parquet(tmp_path / "more", {"text": ["x"], "label": ["a"]})).problems
    assert "cannot be written" in told
    assert "set HF_DATASETS_CACHE" in told


def test_parts_by_hash_keep_what_belongs_together(tmp_path: Path) -> None:
    lines = "".join(f"note {n},a,patient-{n % 20}\n" for n in range(200))
    source = csv(tmp_path, f"text,label,patient\n{lines}")
    spec_parts = [source | {"part": part, "by": ["patient"]} for part in ([0, 0.6], [0.6, 1])]
    train = check(spec_parts[0], test=spec_parts[1])
    assert train.train is not None
    assert train.train.rows % 10 == 0
    assert 0 < train.train.rows < 200
    assert "share" not in train.notes
    assert "lacks" not in train.problems
    assert "has no column 'person' for `by`" in check(source | {"part": [0, 0.5], "by": ["person"]}).problems
    assert "sets only one of `part` and `by`: give both" in check(source | {"part": [0, 0.5]}).problems


def test_rows_without_a_value_to_part_them_by_are_refused(tmp_path: Path) -> None:
    source = csv(tmp_path, "text,label,patient\nx,a,\ny,a,1\nz,a,\n", part=[0, 0.5], by=["patient"])
    assert "has no value of patient, which `by` names, in rows 0, 2: fill it, or leave" in check(source).problems


def test_a_row_is_in_one_part_whatever_the_type_of_its_column(tmp_path: Path) -> None:
    numbers = range(50)
    csv(tmp_path, "patient\n" + "".join(f"{n}\n" for n in numbers))
    choice = {"part": (0, 0.6), "by": ("patient",)}
    expected = rows_of(Source("csv", path=str(tmp_path / "data.csv"), **choice), "", 0)
    for kind in (int, float, str, Decimal):
        file = tmp_path / f"{kind.__name__}.parquet"
        pq.write_table(pa.table({"patient": list(map(kind, numbers))}), file)
        assert rows_of(Source("parquet", path=str(file), **choice), "", 0) == expected


def test_texts_that_may_stand_for_a_missing_value_and_other_labels_are_told(tmp_path: Path) -> None:
    found = check(csv(tmp_path, "text,label\nred,a\nNaN,b\nred,b\nred,a\n"))
    assert found.problems == ""
    assert "has the text 'NaN' in row 1: if it stands for a missing value, leave the row out" in found.notes
    assert "has a label in row 2, which an equal input before it does not have: correct one of them" in found.notes


def test_inputs_that_splits_share_are_told(tmp_path: Path) -> None:
    train = csv(tmp_path, "text,label\nred,a\nsky,b\nleaf,a\n")
    (tmp_path / "test.csv").write_text("text,label\nsky,a\nsea,b\n")
    found = check(train, test={"format": "csv", "path": str(tmp_path / "test.csv")})
    assert found.problems == ""
    assert "train and test share 1 inputs, which train has in row 1" in found.notes


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    from tap_flower.config import read_yaml
    from tap_flower.errors import ConfigError

    (tmp_path / "spec.yaml").write_text("name: a\ntasks:\n- kind: x\n  kind: y\n")
    with pytest.raises(ConfigError, match="the key 'kind' appears twice, in lines 3 and 4"):
        read_yaml(tmp_path / "spec.yaml")
    (tmp_path / "spec.yaml").write_text("base: &b {kind: x}\none: {<<: *b, kind: y}\ntwo: {<<: *b}\n")
    assert read_yaml(tmp_path / "spec.yaml")["one"] == {"kind": "y"}


ODD = [
    b"", b"\0" * 9, b"\xff\xd8\xff", b"PK\x03\x04", b'a,b\n"', b"{", b"[[", b"[1, 2]", b"\xed\xa0\x80", b"GIF89a",
    b"text,label\n" + b"x" * 99,
]  # fmt: skip


@pytest.mark.parametrize("content", ODD)
@pytest.mark.parametrize("form", ["csv", "json", "parquet", "imagefolder", "disk"])
def test_no_file_ends_the_check_in_a_traceback(form: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "images/a/x.png" if form == "imagefolder" else tmp_path / "x"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    source = {"format": form, "path": str(tmp_path / "images" if form == "imagefolder" else path)}
    for kind in ("image_classification", "text_classification"):
        assert check(source, kind).problems
