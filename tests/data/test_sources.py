"""Every format of a source, the mirror of hub data sets, and what a user is told when something is missing."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from PIL import Image

from tap_flower.config import client_specs, load_config, read_yaml
from tap_flower.data.batching import ClientData
from tap_flower.data.examples import Examples
from tap_flower.data.loading import load_client_data
from tap_flower.data.sources import SourceError, open_source, rows_of
from tap_flower.data.spec import ClientSpec, Source, client_spec
from tap_flower.data.text import load_tokenizer
from tap_flower.errors import SpecError
from tap_flower.hub import locate
from tests import mirror
from tests.mirror import KEYS, ROWS, TEST_ROWS, write_mirror

CPU = torch.device("cpu")
NOTES = {"title": ["a red dog", "the law"], "note": ["runs", "asks why"], "urgency": ["routine", "urgent"]}
LABEL = {"label": "urgency"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mirror")
    write_mirror(folder)
    return folder


def triage(source: dict[str, Any], **changes: Any) -> ClientSpec:
    task = {
        "name": "triage", "kind": "text_classification", "modalities": ["text"], "domain": "notes",
        "classes": ["urgent", "routine"], "columns": {"text": ["title", "note"], "label": "urgency"},
        "train": source, "test": source,
    }  # fmt: skip
    return client_spec({"name": "hospital-a", "backbone": "demo", "tasks": [task | changes]})


def data(spec: ClientSpec, root: str = "", **options: Any) -> ClientData:
    return load_client_data(spec, load_tokenizer(locate("demo")), 40, 41, root, **{"hold_out": False} | options)


def words(client: ClientData, split: str = "train", role: str = "text") -> list[str]:
    tokenizer = load_tokenizer(locate("demo"))
    parts = next(iter(client.splits[split].values()))
    found = [example[role] for part in parts for example in part]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]


def labels(examples: Examples) -> list[int]:
    return [example["label"] for example in examples]


def rows_read(examples: Examples) -> list[int]:
    """The rows of the data set that examples are."""
    return [examples.dataset.rows[place] for place in examples.rows]


def write(table: datasets.Dataset, folder: Path, form: str) -> dict[str, Any]:
    """Writes a table, gives the source that reads it."""
    path = folder / f"notes.{form}"
    {"parquet": table.to_parquet, "csv": table.to_csv, "json": table.to_json, "disk": table.save_to_disk}[form](path)
    return {"format": form, "path": str(path)}


@pytest.mark.parametrize("form", ["parquet", "csv", "json", "disk"])
def test_files_and_folders(form: str, tmp_path: Path) -> None:
    client = data(triage(write(datasets.Dataset.from_dict(NOTES), tmp_path, form)))
    assert words(client) == ["a red dog runs", "the law asks why"]
    assert labels(client.splits["train"]["triage"][0]) == [1, 0]  # matched by the class's name


def test_a_json_document_and_a_pattern_of_files(tmp_path: Path) -> None:
    for number in range(2):
        row = {key: values[number] for key, values in NOTES.items()}
        (tmp_path / f"part-{number}.json").write_text(json.dumps([row]))
    client = data(triage({"format": "json", "path": str(tmp_path / "part-*.json")}))
    assert words(client) == ["a red dog runs", "the law asks why"]


def test_a_folder_of_images_for_each_class(tmp_path: Path) -> None:
    for name, colour in (("cat", 10), ("ape", 200)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("L", (8, 8), colour).save(tmp_path / "pets" / name / "1.png")
    source = {"format": "imagefolder", "path": str(tmp_path / "pets")}
    spec = triage(
        source, kind="image_classification", modalities=["image"], classes=["cat", "ape"],
        columns={"image": "image", "label": "label"},
    )  # fmt: skip
    (part,) = data(spec).splits["train"]["triage"]
    pixels = [int(example["image"][0, 0, 0]) for example in part]
    assert dict(zip(labels(part), pixels, strict=True)) == {0: 10, 1: 200}  # the spec's order, not the alphabet's


def test_images_by_path_start_at_the_files_folder(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "x.png")
    (tmp_path / "list.csv").write_text("file,urgency\nx.png,urgent\nx.png,routine\n")
    source = {"format": "csv", "path": str(tmp_path / "list.csv")}
    task = triage(
        source, kind="image_classification", modalities=["image"], columns={"image": "file", "label": "urgency"}
    )
    (part,) = data(task).splits["train"]["triage"]
    assert part[0]["image"][:, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(("name", "reason"), [("gone.png", "No such file"), ("torn.png", "cannot be read as an image")])
def test_a_file_that_is_no_image_is_told_when_the_data_are_loaded(tmp_path: Path, name: str, reason: str) -> None:
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "y.png")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    (tmp_path / "photos.csv").write_text(f"file,urgency\ny.png,urgent\n{name},routine\n")
    source = {"format": "csv", "path": str(tmp_path / "photos.csv")}
    task = triage(
        source, kind="image_classification", modalities=["image"], columns={"image": "file", "label": "urgency"}
    )
    with pytest.raises(SpecError, match=f"train '.*photos.csv' has no image in row 1 of column 'file': .*{reason}"):
        data(task)


def test_relative_paths_start_at_the_specs_folder(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("backbone: ./own\ntasks: [{train: {format: csv, path: a/b.csv}}]\nname: x\n")
    values = read_yaml(tmp_path / "spec.yaml")
    assert values["backbone"] == str(tmp_path / "own")
    assert values["tasks"][0]["train"]["path"] == str(tmp_path / "a" / "b.csv")
    assert values["name"] == "x"


def test_several_data_sets_under_one_task(tmp_path: Path) -> None:
    one = write(datasets.Dataset.from_dict(NOTES), tmp_path, "csv")
    other = write(datasets.Dataset.from_dict({"body": ["old town"] * 5, "class": [1] * 5}), tmp_path, "parquet")
    other |= {"domain": "letters", "columns": {"label": "class"}, "templates": {"text": "{{ body | upper }}!"}}
    spec = triage([one, other])
    client = data(spec)
    assert spec.tasks[0].domains == ("letters", "notes")
    assert words(client)[2] == "old town!"
    assert client.sizes("train") == {"triage": 7}
    batches = list(itertools.islice(client.training_batches(2, 1, CPU), 3))  # an epoch: one of notes, two of letters
    assert sorted(batch.inputs["domain"] for batch in batches) == ["letters", "letters", "notes"]
    held = data(spec, hold_out=True)
    assert (held.sizes("train"), held.sizes("validation")) == ({"triage": 5}, {"triage": 2})


def test_rows_are_those_of_the_librarys_own_shuffle(root: Path) -> None:
    source = Source("hub", "sh0416/ag_news", "train", (3, 20), shuffle=True)
    whole = open_source(source, str(root)).add_column("row", list(range(ROWS)))
    assert rows_of(source, str(root), 41) == list(whole.shuffle(seed=41).select(range(3, 20))["row"])


def test_a_mirror_may_be_what_save_to_disk_wrote(tmp_path: Path) -> None:
    table = mirror.table("sh0416/ag_news", "train")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "one" / "all")
    table.save_to_disk(tmp_path / "two" / "split" / "test")
    for name in ("one/all", "two/split"):
        assert open_source(Source("hub", name, "test"), str(tmp_path))[5] == table[5]
    with pytest.raises(SourceError, match="no split 'valid' in .*all: choose one of train, test"):
        open_source(Source("hub", "one/all", "valid"), str(tmp_path))


def test_a_mirror_may_be_a_download_of_the_hubs_files(tmp_path: Path) -> None:
    folder = tmp_path / "sh0416" / "ag_news"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"label": 3, "title": "t", "description": "d"}\n')
    (folder / "training-notes.jsonl").write_text("not data\n")
    assert open_source(Source("hub", "sh0416/ag_news", "train"), str(tmp_path))["label"][0] == 3


def test_a_download_has_other_splits_and_configs(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    for name, split in (
        ("train-00000-of-00001", "train"),
        ("train_small-00000-of-00001", "test"),
        ("train_sft", "test"),
    ):
        (folder / "en").mkdir(parents=True, exist_ok=True)
        mirror.table("sh0416/ag_news", split).to_parquet(folder / "en" / f"{name}.parquet")
    train = mirror.table("sh0416/ag_news", "train")[:]
    assert open_source(Source("hub", "a/b", "train"), str(tmp_path))[:] == train
    shutil.copytree(folder, tmp_path / "a" / "c")
    shutil.copytree(folder / "en", tmp_path / "a" / "c" / "de")
    with pytest.raises(SourceError, match="'a/c' 'train' in the folders de, en of .*: choose one as `config`"):
        open_source(Source("hub", "a/c", "train"), str(tmp_path))
    assert open_source(Source("hub", "a/c", "train", config="en"), str(tmp_path))[:] == train


def test_one_data_set_on_disk_is_no_split_of_another_name(tmp_path: Path) -> None:
    mirror.table("sh0416/ag_news", "train").to_parquet(tmp_path / "rows.parquet")
    train = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), split="train")
    train.save_to_disk(tmp_path / "o" / "n")
    for source in (Source("disk", path=str(tmp_path / "o" / "n"), split="test"), Source("hub", "o/n", "test")):
        with pytest.raises(SourceError, match="has no split 'test' in .*n, which holds the split 'train': save each"):
            open_source(source, str(tmp_path))
    for split in ("", "train"):
        assert len(open_source(Source("disk", path=str(tmp_path / "o" / "n"), split=split))) == len(train)
    datasets.Dataset.from_dict({"a": ["b"]}).save_to_disk(tmp_path / "plain")
    with pytest.raises(SourceError, match="which holds a data set without splits: save each"):
        open_source(Source("disk", path=str(tmp_path / "plain"), split="train"))


def test_an_incomplete_download_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "data"
    folder.mkdir(parents=True)
    mirror.table("sh0416/ag_news", "test").to_parquet(folder / "train-00000-of-00002.parquet")
    with pytest.raises(SourceError, match="1 of the 2 files of 'a/b' 'train'"):
        open_source(Source("hub", "a/b", "train"), str(tmp_path))


def test_a_missing_data_set_is_one_error_with_the_command_that_fetches_it(tmp_path: Path) -> None:
    source = {"format": "hub", "name": "owner/none", "split": "train", "revision": "abc"}
    fetch = "`hf download owner/none --repo-type dataset --revision abc"
    with pytest.raises(
        SpecError, match=f"client 'hospital-a': task 'triage': train needs 'owner/none' 'train'.*{fetch}`"
    ):
        data(triage(source))
    with pytest.raises(SpecError, match=f"not in data.root .*{fetch} --local-dir {tmp_path}/owner/none`"):
        data(triage(source), str(tmp_path))


def test_what_was_downloaded_before_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "datasets--owner--fetched", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    table = mirror.table("sh0416/ag_news", "train")
    (repository / "snapshots" / commit / "data").mkdir(parents=True)
    table.to_parquet(repository / "snapshots" / commit / "data" / "train-00000-of-00001.parquet")
    for revision in (None, "main", commit):
        assert open_source(Source("hub", "owner/fetched", "train", revision=revision))[3] == table[3]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"labels": [5, 6]}, "has label 'routine' in row 0, .*2 classes with labels 5, 6: correct"),
        ({"columns": LABEL, "templates": {"text": "{{ body }}"}}, "has no column 'body' for text: choose among title"),
        (
            {"columns": LABEL, "templates": {"text": "{{ title.nothing }}"}},
            "cannot fill its template in row 0: ",
        ),
    ],
)
def test_what_does_not_fit_the_data(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    source = write(datasets.Dataset.from_dict(NOTES), tmp_path, "csv")
    with pytest.raises(SpecError, match=f"client 'hospital-a': task 'triage': train {problem}"):
        data(triage(source, **changes))


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    source = write(datasets.Dataset.from_dict(NOTES), tmp_path, "csv")
    with pytest.raises(SpecError, match="unsafe"):
        data(triage(source, columns=LABEL, templates={"text": "{{ title.__class__.__mro__ }}"}))


def test_a_name_in_a_template_is_a_column(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"range": ["a red"], "dict": ["dog"], "urgency": ["urgent"]})
    source = write(table, tmp_path, "csv")
    assert words(data(triage(source, columns=LABEL, templates={"text": "{{ range }} {{ dict }}"}))) == ["a red dog"]
    for wrong, reason in {
        "{{ lipsum() }}": "has no column 'lipsum' for text",
        "{{ dict.upper }}": "a builtin_function_or_method is no text",
        "{{ [dict] | map('upper') }}": "a generator is no text",
    }.items():
        with pytest.raises(SpecError, match=reason):
            data(triage(source, columns=LABEL, templates={"text": wrong}))


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
def test_a_format_that_was_saved_with_a_data_set_is_left_aside(form: str, tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"note": ["a red dog", "the law"], "urgency": [1, 0]})
    table.with_format(form, columns=["urgency"]).save_to_disk(tmp_path / "notes")
    client = data(triage({"format": "disk", "path": str(tmp_path / "notes")}, columns={"text": "note"} | LABEL))
    assert words(client) == ["a red dog", "the law"]
    assert labels(client.splits["train"]["triage"][0]) == [1, 0]


def test_a_row_without_text_is_named(tmp_path: Path) -> None:
    source = write(datasets.Dataset.from_dict({**NOTES, "note": ["x", None]}), tmp_path, "parquet")
    with pytest.raises(SpecError, match="train has no text in row 1 of title, note"):
        data(triage(source))


# --- the paper's data sets ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clients() -> list[ClientSpec]:
    settings = [f"datasets.{key}.rows={ROWS}" for key in KEYS]
    return client_specs(load_config("flava", settings=settings))


def test_labels_1_to_4_of_ag_news_are_classes_0_to_3(root: Path, clients: list[ClientSpec]) -> None:
    client = data(replace(clients[1], tasks=clients[1].tasks), str(root))
    (part,) = client.splits["train"]["agnews_text_classification"]
    raw = mirror.table("sh0416/ag_news", "train")
    assert labels(part) == [raw[row]["label"] - 1 for row in rows_read(part)]
    assert set(labels(part)) <= {0, 1, 2, 3}
    assert words(client)[0] == f"{raw[rows_read(part)[0]]['title']} {raw[rows_read(part)[0]]['description']}"


def test_prompts_of_mmlu_vqa_and_common_gen(root: Path, clients: list[ClientSpec]) -> None:
    settings = {"text_length": 200}
    tokenizer = load_tokenizer(locate("demo"))
    law = load_client_data(clients[6], tokenizer, settings["text_length"], 41, str(root), hold_out=False)
    (part, *_) = law.splits["train"]["text_generation"]
    raw = mirror.table("cais/mmlu", "test", "professional_law")[rows_read(part)[0]]
    options = " ".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", raw["choices"], strict=True))
    asked = f"Choose the right answer to a question about professional law. {raw['question']} {options}"
    assert words(law)[0] == tokenizer.decode(tokenizer(asked)["input_ids"], skip_special_tokens=True)
    answer = "{}. {}".format("ABCD"[raw["answer"]], raw["choices"][raw["answer"]])
    assert words(law, role="target")[0] == tokenizer.decode(tokenizer(answer)["input_ids"], skip_special_tokens=True)
    assert [examples.dataset.domain for examples in law.splits["train"]["text_generation"]] == [
        "law_answering", "medicine_answering", "moral_answering",
    ]  # fmt: skip

    vqa = data(clients[4], str(root))
    (part,) = vqa.splits["train"]["text_generation"]
    raw = mirror.table("merve/vqav2-small", "validation")[rows_read(part)[0]]
    assert words(vqa)[0].endswith(tokenizer.decode(tokenizer(raw["question"])["input_ids"], skip_special_tokens=True))
    assert words(vqa, role="target")[0] == raw["multiple_choice_answer"]
    sentence = words(data(clients[8], str(root)))[0]
    assert "all of these words" in sentence


@pytest.mark.parametrize("seed", [41, 42, 43, 44])
def test_no_test_row_of_vqa_is_in_a_training_pool(seed: int, root: Path, clients: list[ClientSpec]) -> None:
    def rows(split: str) -> set[int]:
        sources = [s for c in clients for task in c.tasks for s in getattr(task, split) if "vqav2" in s.name]
        assert len(sources) == 6
        return {row for source in sources for row in rows_of(source, str(root), seed)}

    assert not rows("train") & rows("test")
    assert (len(rows("train")), len(rows("test"))) == (ROWS, TEST_ROWS)


def test_fashion_mnist_is_normalised_once(root: Path, clients: list[ClientSpec]) -> None:
    (part,) = data(clients[8], str(root)).splits["train"]["image_generation"]
    image = mirror.table("zalando-datasets/fashion_mnist", "train")[rows_read(part)[0]]["image"].resize((64, 64))
    value = image.getpixel((5, 7)) / 255
    expected = [
        (value - mean) / std for mean, std in zip((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), strict=True)
    ]
    assert part.batch([0], CPU).target[0, :, 7, 5].tolist() == pytest.approx(expected, abs=1e-5)


def test_training_decodes_only_the_images_that_it_uses(tmp_path: Path, clients: list[ClientSpec]) -> None:
    write_mirror(tmp_path)  # a folder of its own, so that nobody else has decoded anything
    client = data(clients[0], str(tmp_path))
    images = client.splits["train"]["imagenet_image_classification"][0].dataset.columns["image"]
    batches = client.training_batches(2, 7, CPU)
    next(batches)
    next(batches)
    assert images.decodes == 4
    again = client.training_batches(2, 7, CPU)  # the second participation: nothing is decoded anew
    next(again)
    assert images.decodes == 4
