"""What a sweep file says, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tap_flower.config import load_config, to_yaml
from tap_flower.errors import ConfigError
from tap_flower.files import write_json
from tap_flower.study.plan import Sweep, read_sweep


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    def read(**values: Any) -> Sweep:
        file = tmp_path / "sweep.yaml"
        file.write_text(yaml.safe_dump({"seeds": [1, 2], "methods": ["tap", "fedavg"], **values}, sort_keys=False))
        return read_sweep(file, tmp_path / "out")

    return read


def test_methods_by_seeds(plan: Any, tmp_path: Path) -> None:
    sweep = plan(set={"train.steps": 3, "replacement.enabled": False})
    assert [(run.label, run.seed) for run in sweep.runs] == [("tap", 1), ("fedavg", 1), ("tap", 2), ("fedavg", 2)]
    run = sweep.runs[1]
    assert run.folder == tmp_path / "out" / "fedavg" / "seed-1"
    found = run.resolved
    assert (found.method, found.seed, found.train.steps, found.replacement.enabled) == ("fedavg", 1, 3, False)
    assert sweep.result == {"tap": "tap", "fedavg": "server"}
    assert sweep.reference == "tap"


def test_labelled_variants(plan: Any) -> None:
    methods = {"near": {"method": "fedprox", "baselines.fedprox_mu": 1.0}, "fedavg+finetune": None}
    sweep = plan(methods=methods, seeds=[7])
    near, plain = sweep.runs
    assert (near.label, near.resolved.method, near.resolved.baselines.fedprox_mu) == ("near", "fedprox", 1.0)
    assert (plain.resolved.method, sweep.result["fedavg+finetune"]) == ("fedavg+finetune", "server+finetune")
    assert sweep.reference == "near"  # without a label `tap`, the first


def test_a_setting_may_be_null(plan: Any) -> None:
    assert plan(set={"model.image_size": None}).runs[0].resolved.model.image_size is None


def test_a_config_file_lies_beside_the_sweep(plan: Any, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("rounds: 3\n")
    assert plan(config="more.yaml").runs[0].resolved.rounds == 3
    assert plan(config=None).runs[0].resolved.rounds != 3


def test_equal_steps_give_a_method_with_one_model_twice_the_steps_of_tap(plan: Any, tmp_path: Path) -> None:
    settings = {"train.steps": 10, "distill.iterations": 7, "train.personal_from": 1}
    methods = {"tap": None, "local": None, "fedavg": None, "ditto": {"baselines.ditto_lambda": 0.01}}
    sweep = plan(methods=methods, budgets=["rounds", "steps"], set=settings)
    rounds, steps = sweep.budgets["rounds"], sweep.budgets["steps"]
    assert {label: run.settings[-3:-1] for (label, seed), run in steps.items() if seed == 1 and label != "tap"} == {
        "local": ("train.steps=20", "distill.iterations=14"),
        "fedavg": ("train.steps=20", "distill.iterations=7"),  # it has no stage 2
        "ditto": ("train.steps=10", "distill.iterations=14"),
    }
    assert all(run.settings[:2] == ("train.steps=10", "distill.iterations=7") for run in rounds.values())
    assert steps["tap", 2] == rounds["tap", 2]  # is run once
    assert steps["ditto", 2].folder == tmp_path / "out" / "ditto+steps" / "seed-2"
    assert "baselines.ditto_lambda=0.01" in steps["ditto", 2].settings
    first = ["tap", "local", "fedavg", "ditto", "local+steps", "fedavg+steps", "ditto+steps"]
    assert [(run.label, run.seed) for run in sweep.runs] == [(label, seed) for seed in (1, 2) for label in first]


def test_a_tap_with_fewer_steps_of_its_personal_models_gets_them_for_the_servers_copies(plan: Any) -> None:
    late = {"tap": {"train.personal_from": 5}, "local": None}
    steps = plan(methods=late, budgets=["steps"], set={"rounds": 8, "train.steps": 10}).budgets["steps"]
    assert "train.steps=13" in steps["tap", 1].settings  # 20 in a round, of which half of the rounds take twice as many
    assert "train.steps=20" in steps["local", 1].settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": []}, r"seeds is \[\]: list different whole numbers"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]"),
        ({"seeds": [-1]}, r"seeds is \[-1\]"),
        ({"seeds": ["a"]}, r"seeds is \['a'\]"),
        ({"methods": []}, r"methods is \[\]: list names of methods"),
        ({"methods": ["tapp"]}, r"tapp: unknown method 'tapp' \(did you mean 'tap'\?\)"),
        (
            {"methods": {"a/b": {"method": "tap"}}},
            r"methods has the label 'a/b', which names a folder: leave the path out",
        ),
        ({"methods": {"..": {"method": "tap"}}}, r"methods has the label '\.\.', which names a folder"),
        ({"methods": {"": {"method": "tap"}}}, r"methods has the label '': give it a name in printable characters"),
        ({"methods": {"a\nb": {"method": "tap"}}}, r"methods has the label 'a\\nb': give it a name"),
        ({"methods": ["tap", "tap"]}, r"the method tap is given twice: give it once"),
        ({"set": {"seed": 5}}, r"set has seed=5, which would be overridden: list seeds under `seeds`"),
        ({"set": {"method": "fedavg"}}, r"set has method=fedavg, which would be overridden: list methods"),
        ({"methods": {"x": {"method": "tap", " seed": 7}}}, r"x has  seed=7, which would be overridden: list seeds"),
        ({"set": {"rounds": 3, " rounds": 4}}, r"give rounds two values: leave one of them out"),
        ({"methods": {"tap": 3}}, r"methods is \{'tap': 3\}: list names"),
        ({"methods": [{"tap": {"train.steps": 3}}]}, r"methods is \[\{'tap': .*or write `label: settings` lines"),
        ({"methods": {"tap": {"train": {"steps": 3}}}}, r"methods is \{'tap': "),
        ({"methods": None}, r"methods is \[\]: list names"),
        ({"config": 3}, r"config is 3: give the path of a YAML file"),
        ({"set": [1]}, r"set is \[1\]: write `key: value` lines"),
        ({"set": {"train": {"steps": 3}}}, r"set is \{'train': .*with dots in the key"),
        ({"set": {"data.root": "a b"}}, r"a value with spaces goes into the `config` file"),
        ({"set": {"train.stepps": 3}}, r"tap: .*train.stepps"),
        ({"preset": "demoo"}, r"tap: unknown preset 'demoo'"),
        ({"sedes": [1]}, r"unknown 'sedes': use preset, config, seeds, set, methods, budgets"),
        ({"budgets": []}, r"budgets is \[\]: list rounds, steps or both"),
        ({"budgets": ["hours"]}, r"budgets is \['hours'\]"),
        ({"budgets": "steps"}, r"budgets is 'steps'"),
        (
            {"budgets": ["steps"], "methods": {"long": {"method": "tap", "train.steps": 9}}},
            r"long sets train.steps=9, on which the budget `steps` counts: put it under `set`",
        ),
        (
            {"budgets": ["steps"], "methods": {"local": None, "local+steps": {"method": "local"}}},
            r"methods has 'local\+steps', the folder of 'local' with equal steps: rename it",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(plan: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**values)


def test_a_finished_run_of_another_configuration_is_not_taken_for_this_one(plan: Any) -> None:
    (run, *_) = plan().runs
    run.folder.mkdir(parents=True)
    write_json(run.folder / "results.json", {})
    (run.folder / "config.yaml").write_text(to_yaml(load_config(run.preset, "", run.settings)))
    assert plan().runs[0].done
    with pytest.raises(ConfigError, match=r"seed-1 holds a run with another configuration \(train.steps differ\)"):
        plan(set={"train.steps": 3})
