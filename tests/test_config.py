from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tap_flower.config import (
    Config,
    ReplacementSource,
    check_contradictions,
    client_specs,
    hyper_parameters,
    load_config,
    options,
    plain,
    presets,
    sent_hyper_parameters,
    simulated_clients,
    simulated_run,
    to_yaml,
)
from tap_flower.config.options import Distill, Train
from tap_flower.errors import ConfigError
from tap_flower.plain import leaves


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("rounds: 7\ntrain: {steps: 5, batch_size: 8}\n")
    config = load_config("demo", str(file), ["train.steps=3", "replacement.source=received"])
    assert (config.rounds, config.train.steps, config.train.batch_size) == (7, 3, 8)
    assert config.replacement.source is ReplacementSource.received
    assert config.train.weight_decay == Train().weight_decay


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["train.stepz=3"], r"unknown key 'train.stepz' \(did you mean 'train.steps'\?\)"),
        (["roundz=3"], r"unknown key 'roundz' \(did you mean 'rounds'\?\)"),
        (["rounds=many"], "setting 'rounds=many': rounds:.*'many'"),
        (["rounds=0"], "rounds = 0 is out of bounds: choose between 1 and"),
        (["train.learning_rate=.nan"], "train.learning_rate = nan is out of bounds"),
        (["replacement.source=borrowed"], "replacement.source.*'borrowed'.*trained.*received"),
        (["replacement.margin.text_generation=-1"], "replacement.margin.text_generation = -1"),
        (["distill.weight.smells=1"], "unknown key 'distill.weight.smells'"),
        (["rounds"], "setting 'rounds' has no '='"),
        (["rounds="], "rounds"),
        (["train=3"], "'train' stands for several options: set train.steps, "),
        (["rounds=["], "setting 'rounds=\\[': it is no YAML"),
        (["rounds=2020-13-45"], "it is no YAML: month must be"),
        (["train.learning_rate=0x" + "f" * 300], "a whole number of 1200 bits"),
        (["train." + "a." * 10_000 + "b=1"], "has a key of more than 32 parts"),
        (["datasets.d=???"], "the configuration: datasets.d"),
        (["trackers=${nowhere}"], "trackers.*nowhere"),
        (
            ["train.accumulation=${rounds}", "rounds=5000"],
            "the configuration: train.accumulation = 5000 is out of bounds",
        ),
        (["clients=[3]"], r"client '\?' is 3"),
        (
            ["clients=[]", "groups=3"],
            r"setting 'groups=3': groups makes no clients where setting 'clients=\[\]' lists them",
        ),
        (["preset=flava"], "setting 'preset=flava' has preset 'flava', and the run has 'demo': choose one"),
        (
            ["train.start_learning_rate=0.01"],
            "train.start_learning_rate = 0.01 is above train.learning_rate = 0.001, its peak",
        ),
        (["baselines.pfedme_lambda=0.1"], "their product is above 1, and w would go beyond θ; .* at most 10"),
    ],
)
def test_a_wrong_setting_names_key_value_and_remedy(settings: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        client_specs(load_config("demo", "", settings))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train.steps: 7", "file '.*c.yaml': 'train.steps' is no key of a file: write `steps` below `train:`"),
        ("clients:", "clients has no value: give one"),
        ("clients: {a: 1}", "clients is {'a': 1}: give a list, as YAML writes it"),
        ("admission: {clients: [on]}", r"admission.clients is \[True\], and YAML reads yes, no, on and off as true"),
        ("metrics: {bertscore: yes}", "metrics.bertscore is True, and YAML reads yes, no"),
    ],
)
def test_what_yaml_makes_of_a_file_is_told(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_config("plug-in", str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("key", ["backbone", "metrics.bertscore"])
def test_a_model_in_a_folder_starts_at_the_file_and_has_a_whole_path_in_a_setting(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} = './m' is relative: give an absolute path in a setting"):
        load_config("plug-in", "", [f"{key}=./m"])
    group, _, name = key.rpartition(".")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({group: {name: "./m"}} if group else {name: "./m"}))
    assert dict(leaves(plain(load_config("plug-in", str(tmp_path / "c.yaml")))))[key] == str(tmp_path / "m")


def test_settings_that_contradict_each_other_are_refused() -> None:
    check_contradictions(["train.steps=5", "rounds=3", "rounds=3"])
    with pytest.raises(
        ConfigError, match=r"setting 'train={steps: 5}' and setting 'train.steps=6' give train.steps two"
    ):
        check_contradictions(["train={steps: 5}", "train.steps=6"])


def test_a_file_of_another_preset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("preset: flava\n")
    with pytest.raises(ConfigError, match="run.yaml' has preset 'flava', and the run has 'demo': .*--preset flava"):
        load_config("demo", str(tmp_path / "run.yaml"))
    assert load_config("flava", str(tmp_path / "run.yaml")).preset == "flava"


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'demmo' \(did you mean 'demo'\?\): use one of .*demo"):
        load_config("demmo")


@pytest.mark.parametrize(("text", "problem"), [("- 1\n", "holds no keys"), ("a: [", "cannot be read")])
def test_an_unreadable_file_is_named(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"bad.yaml.*{problem}"):
        load_config("demo", str(file))
    with pytest.raises(ConfigError, match="none.yaml.*cannot be read"):
        load_config("demo", str(tmp_path / "none.yaml"))


def test_every_preset_loads_and_survives_a_round_trip(tmp_path: Path) -> None:
    for name in presets():
        config = load_config(name)
        assert len(client_specs(config)) == len(config.clients)
        values = yaml.safe_load(to_yaml(config))
        del values["preset"]
        file = tmp_path / "again.yaml"
        file.write_text(yaml.safe_dump(values))
        assert plain(load_config(name, str(file))) == plain(config)


def test_every_option_has_a_help_text() -> None:
    found = list(options())
    assert all(metadata["help"] for _, _, metadata in found)
    keys = {key for key, _, _ in found}
    assert {
        "rounds", "clients_per_round", "seed", "train.steps", "train.batch_size", "distill.iterations",
        "distill.weight.text_classification", "replacement.margin.image_generation", "replacement.source",
        "replacement.evidence",
    } <= keys  # fmt: skip


def test_the_learning_rate_warms_up() -> None:
    # 1e-4 + (3e-4 - 1e-4) · min(r / 20, 1), where r counts from 0 and our rounds from 1
    train = Train(learning_rate=3e-4, start_learning_rate=1e-4, warmup_rounds=20)
    assert train.optimisation(1).learning_rate == pytest.approx(1e-4)
    assert train.optimisation(11).learning_rate == pytest.approx(2e-4)
    assert train.optimisation(21).learning_rate == train.optimisation(150).learning_rate == pytest.approx(3e-4)
    assert Train(learning_rate=0.5).optimisation(1).learning_rate == 0.5
    assert Distill(iterations=9, learning_rate=0.5).optimisation(train).steps == 9


def test_clients_receive_hyper_parameters_and_nothing_else() -> None:
    sent = sent_hyper_parameters(load_config("demo", "", ["train.steps=3"]))
    assert set(sent) == {
        "method", "seed", "model", "compute", "train", "distill", "replacement", "baselines", "stopping", "wire",
    }  # fmt: skip
    assert hyper_parameters(sent).train.steps == 3


@pytest.mark.parametrize(
    "sent",
    [
        {"clients": []},
        {"train": {"steps": 0}},
        {"train": {"steps": "${oc.env:HOME}"}},
        {"model": {"backbone": "evil/hub"}},
        {"seed": "x"},
        {"train": 3},
        {"compute": {"compile": True}},
        {"compute": {"loader_workers": 2}},
    ],
)
def test_a_server_cannot_set_anything_else(sent: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="the server"):
        hyper_parameters(sent)


def test_whether_to_compile_and_read_ahead_is_not_sent() -> None:
    config = load_config("demo", "", ["compute.compile=true", "compute.loader_workers=2", "compute.recompute=true"])
    assert config.compute.compile
    assert sent_hyper_parameters(config)["compute"] == {
        "precision": "float32",
        "recompute": True,
        "deterministic": False,
    }
    with pytest.raises(ConfigError, match=r"the server: unknown key 'compute.compile'"):
        hyper_parameters({"compute": {"compile": False}})


def test_losses_of_unlike_weights_are_not_compared() -> None:
    problem = "replacement.source = received and replacement.evidence = training: .*set replacement.evidence=validation"
    unlike = ["replacement.source=received", "replacement.evidence=training"]
    with pytest.raises(ConfigError, match=problem):
        load_config("demo", "", unlike)
    with pytest.raises(ConfigError, match=problem):
        load_config("flava", "", unlike[:1])  # the preset compares training losses
    with pytest.raises(ConfigError, match=problem):
        hyper_parameters({"replacement": {"source": "received", "evidence": "training"}})
    load_config("flava", "", ["replacement.source=received", "replacement.evidence=validation"])


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("replacement.mode=mix", "replacement.mode=hard"),
        ("replacement.before_stage_two=true", "replacement.before_stage_two=false"),
        ("replacement.after_stage_two=true", "replacement.after_stage_two=false"),
        ("distill.only_better=true", "distill.only_better=false"),
    ],
)
def test_what_compares_held_out_losses_is_refused_with_training_losses(setting: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"set replacement.evidence=validation, or {remedy}"):
        load_config("flava", "", [setting])
    load_config("flava", "", [setting, "replacement.evidence=validation"])
    both = "replacement.mode=hard and replacement.before_stage_two=false"
    with pytest.raises(ConfigError, match=f"replacement.evidence=validation, or {both}"):
        load_config("flava", "", ["replacement.mode=mix", "replacement.before_stage_two=true"])


def test_flowers_run_configuration_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    given = {"preset": "demo", "config": "", "set": "rounds=7 train.steps=3", "out": "", "resume": False}
    config, folder = simulated_run(given, 12)
    assert (config.preset, config.rounds, config.train.steps) == ("demo", 7, 3)
    assert folder == tmp_path / "tap-flower-runs" / "demo-12"
    assert simulated_run({**given, "out": "/runs/one"}, 13) == (config, Path("/runs/one"))
    assert simulated_run({}, 13)[0].preset == "demo"
    listed = shlex.join(["data.root=/my data", "admission.clients=[client-0, client-1]"])
    found, _ = simulated_run({**given, "set": listed}, 13)
    assert (found.data.root, found.admission.clients, found.seed) == ("/my data", ["client-0", "client-1"], 41)
    with pytest.raises(ConfigError, match="set = .*No closing quotation; put a value with spaces in quotes"):
        simulated_run({**given, "set": "data.root='/my"}, 13)
    with pytest.raises(ConfigError, match="out = 'runs/one' is relative.*give an absolute path"):
        simulated_run({**given, "out": "runs/one"}, 13)
    assert [spec.name for spec in simulated_clients(given)] == [f"client-{n}" for n in range(12)]
    with pytest.raises(ConfigError, match="rounds = 0 is out of bounds"):
        simulated_run({**given, "set": "rounds=0"}, 14)


def test_two_clients_of_one_name_are_an_error() -> None:
    config = load_config("demo")
    double = Config(**{**vars(config), "clients": [config.clients[0], config.clients[0]]})
    with pytest.raises(ConfigError, match="two clients are named 'client-0'"):
        client_specs(double)


def words_of(name: str, **task: Any) -> dict[str, Any]:
    """A client spec with a task of text classification."""
    own: dict[str, Any] = {"kind": "text_classification", "modalities": ["text"], "domain": "d", "classes": ["a", "b"]}
    source = {"format": "csv", "path": "/data/train.csv"}
    own |= {"columns": {"text": "x", "label": "y"}, "train": source, "test": source}
    return {"name": name, "tasks": [{"name": "t", **own, **task}]}


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        (
            {"classes": ["b", "a"]},
            "task 't' of client 'bob' has other classes than on client 'ann', or in another order",
        ),
        (
            {"kind": "text_generation", "classes": None, "columns": {"text": "x", "target": "y"}},
            "task 't' of client 'bob' is of kind text_generation, and client 'ann' has it with text_classification",
        ),
    ],
)
def test_clients_that_mean_something_else_by_a_task_are_an_error(task: dict[str, Any], problem: str) -> None:
    other = words_of("bob", **task)
    other["tasks"] = [{key: value for key, value in other["tasks"][0].items() if value is not None}]
    with pytest.raises(ConfigError, match=problem):
        client_specs(Config(clients=[words_of("ann"), other]))


def test_a_client_without_a_backbone_keeps_its_revision() -> None:
    config = Config(clients=[{**words_of("ann"), "revision": "abc"}, words_of("bob")], backbone="o/n")
    assert [(spec.backbone, spec.revision) for spec in client_specs(config)] == [("o/n", "abc"), ("o/n", None)]


TASK: dict[str, Any] = {"name": "t", "train": {"data": "d", "split": "train", "share": [0, 1]}}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"patterns": [3]}, "pattern 0 has no tasks"),
        ({"patterns": [{"tasks": 3}]}, "pattern 0 has no tasks"),
        ({"patterns": [{"tasks": ["t"]}]}, "pattern 0 has the task 't': write"),
        ({"patterns": [{"tasks": [{**TASK, "train": 3}]}]}, "pattern 0: task 't': train is 3: give a source"),
        (
            {"patterns": [{"tasks": [{**TASK, "train": {"data": ["d"]}}]}]},
            r"has data \['d'\]: use one of tiny_imagenet, .*, d",
        ),
        (
            {"patterns": [{"tasks": [{**TASK, "train": {"data": "d", "share": [0]}}]}]},
            r"has share \[0\]: give \[from, to\]",
        ),
        ({"patterns": [{"tasks": [{**TASK, "train": {"data": "d", "share": ["a", "b"]}}]}]}, "has share"),
        ({"patterns": [{"tasks": [{**TASK, "train": {"data": "d", "share": [0, 1e308]}}]}]}, "has share"),
        ({"datasets": {"d": 3}}, "data set 'd' is 3: write"),
        ({"datasets": {"d": {"name": "o/n", "rows": [1]}}}, r"data set 'd' has rows \[1\]: give their number"),
        (
            {"datasets": {"d": {"name": "o/n", "rows": 9, "format": "csv"}}},
            "data set 'd' has format 'csv': use hub or packaged",
        ),
        (
            {"patterns": [{"tasks": [{**TASK, "train": {"data": "d", "format": "packaged"}}]}]},
            "train has data 'd' and format 'packaged': give one of the two",
        ),
        (
            {"patterns": [{"tasks": [{**TASK, "train": {**TASK["train"], "rows": [0, 5]}}]}]},
            r"train has share \[0, 1\] and rows \[0, 5\]: give one of the two",
        ),
        (
            {"patterns": [{"name": "p", "tasks": [TASK]}]},
            "pattern 0 has the name 'p', and its clients are named client-0",
        ),
    ],
)
def test_wrong_patterns_are_refused_by_name(tmp_path: Path, values: dict[str, Any], problem: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"datasets": {"d": {"name": "o/n", "rows": 20}}, **values}))
    with pytest.raises(ConfigError, match=problem):
        load_config("flava", str(file))


def test_patterns_take_packaged_data_and_sources_as_they_are(tmp_path: Path) -> None:
    file, csv = tmp_path / "mine.yaml", {"format": "csv", "path": "/data/test.csv"}
    task = {**TASK, "kind": "text_classification", "modalities": ["text"], "domain": "d", "classes": ["a", "b"]}
    task |= {"columns": {"text": "text", "label": "label"}, "test": csv}
    data = {"d": {"format": "packaged", "name": "names", "rows": 21}}
    file.write_text(yaml.safe_dump({"datasets": data, "patterns": [{"tasks": [task]}], "groups": 2}))
    specs = client_specs(load_config("plug-in", str(file)))
    found = [spec.tasks[0].train[0] for spec in specs]
    assert [(source.format, source.name, source.rows) for source in found] == [
        ("packaged", "names", (0, 10)),
        ("packaged", "names", (10, 21)),
    ]
    assert {spec.tasks[0].test[0].path for spec in specs} == {"/data/test.csv"}


def test_a_path_that_cannot_be_is_named() -> None:
    with pytest.raises(ConfigError, match=r"file .* cannot be read: embedded null byte"):
        load_config("demo", "a\0b")
