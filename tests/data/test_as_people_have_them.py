"""Data as public bug reports have them: each is read as its owner means it, or refused. Nothing is guessed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tap_flower.data.check import SplitSummary, check_data, check_spec

RED, BLUE = (255, 0, 0), (0, 0, 255)
AB = ("a", "b")
Build = Callable[[Path], dict[str, Any]]


@dataclass
class Found:
    """What `check` finds in a client of one task, whose training and test rows are the same."""

    problems: str
    notes: str
    train: SplitSummary | None

    @property
    def labels(self) -> list[str]:
        assert self.train is not None
        return [example.found["label"] for example in self.train.examples]

    @property
    def texts(self) -> list[str]:
        assert self.train is not None
        return [example.found["text"] for example in self.train.examples]

    def mean(self, row: int = 0) -> Any:
        assert self.train is not None, self.problems
        return np.array(self.train.examples[row].found["image"]["mean"])


def check(source: dict[str, Any], kind: str = "text_classification", **task: Any) -> Found:
    image = kind.startswith("image")
    columns = {"image": "image"} if image else {"text": "text"}
    columns |= {"label": "label"} if kind.endswith("classification") else {}
    values = {
        "name": "t", "kind": kind, "modalities": ["image" if image else "text"], "domain": "d", "columns": columns,
        "classes": list(AB) if kind.endswith("classification") else [], "train": source, "test": source,
    }  # fmt: skip
    spec, problems = check_spec({"name": "c", "backbone": "demo", "tasks": [values | task]})
    summaries: list[SplitSummary] = []
    if spec is not None:
        summaries, more = check_data(spec, 40, 41)
        problems += more
    told = ["\n".join(str(problem) for problem in problems if problem.is_note is is_note) for is_note in (False, True)]
    return Found(told[0], told[1], summaries[0] if summaries else None)


def csv(folder: Path, text: str, written: str = "utf-8", **more: Any) -> dict[str, Any]:
    (folder / "data.csv").write_bytes(text.encode(written))
    return {"format": "csv", "path": str(folder / "data.csv"), **more}


def json_(folder: Path, *rows: Any) -> dict[str, Any]:
    (folder / "data.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return {"format": "json", "path": str(folder / "data.jsonl")}


def parquet(folder: Path, columns: dict[str, Any]) -> dict[str, Any]:
    pq.write_table(pa.table(columns), folder / "data.parquet")
    return {"format": "parquet", "path": str(folder / "data.parquet")}


def picture(path: Path, colour: Any = RED, mode: str = "RGB", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 20), colour).save(path, **options)


def folder_of(folder: Path, **more: Any) -> dict[str, Any]:
    return {"format": "imagefolder", "path": str(folder / "images"), **more}


def one_image(folder: Path, made: Image.Image | Sequence[Image.Image], suffix: str = "png", **task: Any) -> Found:
    frames = [made] if isinstance(made, Image.Image) else list(made)
    more = {"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}
    frames[0].save(folder / f"a.{suffix}", **more)
    return check(csv(folder, f"image,label\na.{suffix},a\n"), "image_classification", **task)


def deep(values: Any) -> Image.Image:
    return Image.fromarray(values)


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


# --- labels ---------------------------------------------------------------------------------------


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
        ([0, 2], ["-1", "0", "x"], "has label 2"),
        ([1, 0], ["a", "b"], ["b", "a"]),
        (["1", "0"], ["a", "b"], ["b", "a"]),
        (["01", "0"], ["a", "b"], "has label '01'"),
        ([1, 2], ["a", "b"], "has label 2"),
        ([None, "a"], ["a", "b"], "has label None"),
        (["a ", "b"], ["a", "b"], "differ in case, blanks"),
        (["cafe\u0301", "b"], ["caf\u00e9", "b"], "differ in case, blanks or Unicode form only"),
        ([float("nan"), 1.0], ["a", "b"], "has label nan"),
        ([["a"], ["b"]], ["a", "b"], "has label ['a']"),
    ],
)
def test_labels_are_names_before_they_are_places(labels: Any, classes: Any, expected: Any, tmp_path: Path) -> None:
    found = check(parquet(tmp_path, {"text": ["red", "sky"], "label": labels}), classes=classes)
    if isinstance(expected, str):
        assert expected in found.problems
    else:
        assert (found.problems, found.labels) == ("", expected)
        by_place = not {str(label).removesuffix(".0").lower() for label in labels} <= {c.lower() for c in classes}
        assert ("read as places in `classes`: '0 is a', '1 is b'" in found.notes) is by_place


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
    assert "read as places" in counted.notes
    written = check(source, "text_generation", columns={"text": "text", "target": "label"})
    assert written.train is not None
    assert [example.found["target"] for example in written.train.examples] == ["pos", "neg"]  # not "1" and "0"


def test_a_class_without_examples_is_a_note(tmp_path: Path) -> None:
    found = check(csv(tmp_path, "text,label\nred,a\nsky,a\n"))
    assert found.problems == ""
    assert "train has no example of class 'b'" in found.notes


def test_a_label_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    assert "names the label '1' twice" in check(csv(tmp_path, "text,label\nx,1\n"), labels=[1, "1"]).problems


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        ((RAMP * 65535).astype(np.uint16), "png"),
        ((RAMP * 65535).astype(np.uint16), "tif"),
        (RAMP.astype(np.float32), "tif"),
        ((RAMP * 255).astype(np.uint8), "png"),
    ],
)
def test_deep_images_are_scaled_by_what_their_type_says(values: Any, suffix: str, tmp_path: Path) -> None:
    found = one_image(tmp_path, deep(values), suffix)
    assert found.problems == ""
    assert found.mean() == pytest.approx([0.5] * 3, abs=0.02)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ((RAMP * 2e9).astype(np.int32), "32 bits"),
        ((RAMP * 255).astype(np.float32), "values from 0 to 255: save them between 0 and 1"),
        (np.full((64, 64), np.nan, np.float32), "values from nan to nan"),
    ],
)
def test_images_without_a_scale_are_refused(values: Any, problem: str, tmp_path: Path) -> None:
    assert problem in one_image(tmp_path, deep(values), "tif").problems


def test_twelve_bits_in_sixteen_are_told(tmp_path: Path) -> None:
    found = one_image(tmp_path, deep((RAMP * 4095).astype(np.uint16)))
    assert "nearly black in row 0 (row 0: 6.2% of 16 bits): scale it" in found.notes


def transparent(mode: str) -> Image.Image:
    alpha = np.zeros((64, 64), np.uint8)
    alpha[16:48, 16:48] = 255
    image = Image.new("LA" if mode == "LA" else "RGBA", (64, 64), 0)
    image.putalpha(Image.fromarray(alpha))
    if mode == "P":
        indexed = Image.fromarray((alpha == 0).astype(np.uint8), "L").convert("P")
        indexed.putpalette([0, 0, 0, 255, 0, 0])
        indexed.info["transparency"] = 1
        return indexed
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize(("background", "mean"), [("white", 0.75), ("black", 0.0), ("#808080", 0.376)])
def test_transparent_images_are_composed(mode: str, background: str, mean: float, tmp_path: Path) -> None:
    more = {} if background == "white" else {"image": {"background": background}}
    found = one_image(tmp_path, transparent(mode), **more)
    assert found.problems == ""
    assert found.mean() == pytest.approx([mean] * 3, abs=0.02)


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp"])
def test_a_file_of_several_pictures_is_refused(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), RED), Image.new("RGB", (20, 20), BLUE)]
    assert "holds 2 pictures" in one_image(tmp_path, frames, suffix).problems


def test_a_photograph_is_turned_as_its_exif_data_say(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    found = check(csv(tmp_path, "image,label\na.png,a\n"), "image_classification")
    assert found.train is not None
    assert found.train.examples[0].found["image"]["size"] == [20, 40]


def encoded(colour: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("form", ["bytes", "mapping", "path", "nested bytes"])
def test_columns_of_bytes_and_paths_are_decoded(form: str, tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    picture(tmp_path / "1.png", BLUE)
    files = [encoded(RED), encoded(BLUE)]
    column: Any = {
        "bytes": pa.array(files, pa.binary()),
        "nested bytes": pa.array([{"bytes": file} for file in files]),
        "mapping": pa.array([{"bytes": file, "path": "gone.png"} for file in files]),
        "path": [{"bytes": None, "path": f"{n}.png"} for n in range(2)],
    }[form]
    found = check(parquet(tmp_path, {"image": column, "label": ["a", "b"]}), "image_classification")
    assert found.problems == ""
    assert (found.mean(0)[0], found.mean(1)[2]) == (1, 1)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("https://host/x.png", "is an address: download the file"),
        ("", "the column is empty"),
        ([1, 2], "the column holds a list"),
        ("gone.png", "gone.png"),
    ],
)
def test_what_is_no_image_is_told(value: Any, problem: str, tmp_path: Path) -> None:
    found = check(parquet(tmp_path, {"image": [value], "label": ["a"]}), "image_classification")
    assert "has no image in row 0 of column 'image'" in found.problems
    assert problem in found.problems


FORM = {"mean": [0, 0, 0], "std": [1, 1, 1]}


@pytest.mark.parametrize(("form", "share"), [("crop", 1.0), ("pad", 1 / 9), ("squeeze", 1 / 3)])
def test_the_size_and_the_fit_are_the_tasks(form: str, share: float, tmp_path: Path) -> None:
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste((255, 255, 255), (32, 0, 64, 32))
    found = one_image(tmp_path, wide, image={"size": 24, "fit": form, "background": "black", **FORM})
    assert found.train is not None
    assert found.train.examples[0].shown["image"] == "96x32 image, as 24x24"
    assert found.mean() == pytest.approx([share] * 3, abs=0.03)


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"size": 50}, "image has size 50: use a multiple of 8"),
        ({"fit": "stretch"}, "image has fit 'stretch': use one of crop, pad, squeeze"),
        ({"mean": [0.5]}, "image has mean [0.5]: give three numbers"),
        ({"std": [0, 1, 1]}, "image has std [0, 1, 1]: give three numbers from 0.001 to 1"),
        ({"background": "whit"}, "image has background 'whit': give a colour's name"),
        ({"sise": 64}, "did you mean 'size'"),
    ],
)
def test_a_wrong_form_is_refused(form: Any, problem: str, tmp_path: Path) -> None:
    assert problem in one_image(tmp_path, Image.new("RGB", (8, 8)), image=form).problems


# --- folders of images ----------------------------------------------------------------------------


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
    assert "has 4 files that are no images, which are passed over: 1 without a suffix, 1 .db, 2 .dcm" in found.notes


def test_images_beside_folders_have_no_class(tmp_path: Path) -> None:
    picture(tmp_path / "images/a/1.png")
    picture(tmp_path / "images/2[1].png", BLUE)
    assert "has label None in row 0" in check(folder_of(tmp_path), "image_classification").problems
    assert check(folder_of(tmp_path), "image_generation").problems == ""


def test_a_metadata_file_names_the_images(tmp_path: Path) -> None:
    picture(tmp_path / "images/1.png")
    (tmp_path / "images/metadata.csv").write_text("file_name,label\n1.png,b\n")
    assert check(folder_of(tmp_path), "image_classification").labels == ["b"]


# --- tables ---------------------------------------------------------------------------------------


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
        ("text,label\nrouge é,a\n", "latin-1", {}, "is no UTF-8: say its `encoding`"),
        ("text,label\nrouge é,a\n", "latin-1", {"encoding": "latin-1"}, ""),
        ("text,label\nrouge é,a\n", "utf-8-sig", {}, ""),
        ("text,label\nrouge é,a\n", "utf-16", {"encoding": "utf-16"}, ""),
        ("text;label\nrouge é;a\n", "utf-8", {}, "has no column 'text' for text: choose among text;label"),
        ("text;label\nrouge é;a\n", "utf-8", {"delimiter": ";"}, ""),
        ("text,label\nrouge é,a,b\n", "utf-8", {}, "Expected 2 columns, got 3"),
        ('text,label\n"rouge é,a\nx,b\n', "utf-8", {}, "Expected 2 columns, got 1"),
        ("text,text,label\nrouge é,x,a\n", "utf-8", {}, "has two columns 'text'"),
        ("", "utf-8", {}, "Empty CSV file"),
        ("text,label\n", "utf-8", {}, "has a source with 0 rows"),
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


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (['{"text": "x", "text": "y", "label": "a"}'], "the key 'text' stands twice"),
        ([{"text": "x", "label": "a"}, {"text": 5, "label": "a"}], "column 'text' holds values of several types"),
        ([{"text": "x", "label": "a"}, '{"text": '], "object 1: "),
        (['"text"'], "it is a str; write a list of objects"),
        ([{"text": {"de": "x"}, "label": "a"}], "has a dict as text in row 0"),
        ([{"label": "a"}, {"label": "b", "text": "x"}], "has no text in row 0"),
    ],
)
def test_json_files(rows: Any, problem: str, tmp_path: Path) -> None:
    assert problem in check(json_(tmp_path, *rows)).problems


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


# --- parts and shared rows ------------------------------------------------------------------------


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
    assert "has part or by alone" in check(source | {"part": [0, 0.5]}).problems


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
    with pytest.raises(ConfigError, match="the key 'kind' stands twice, in lines 3 and 4"):
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
