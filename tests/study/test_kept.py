"""What is kept of a sweep: small files, from which its tables are made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tap_flower.config import Config, plain, to_yaml
from tap_flower.core.headline import Headline
from tap_flower.errors import ConfigError
from tap_flower.report.configuration import different, moved, portable, recorded
from tap_flower.report.html_report import page
from tap_flower.report.result_tables import differences, groups
from tap_flower.report.results import results
from tap_flower.report.run_record import read_runs
from tap_flower.study.comparison import compare
from tap_flower.study.kept import keep
from tap_flower.study.plan import Sweep, read_sweep
from tap_flower.study.sweep_tables import comparison_tables, markdown
from tests.federations import LANGUAGES

SWEEP = "seeds: [1, 2]\nmethods: [tap]\nset: {train.steps: 3}\n"


def write_run(run: Path, config: Config, clients: int) -> None:
    """Results of a run as they are written, of clients with two tasks each and four models."""
    metrics = {"loss": 1 / 3, "accuracy": 2 / 3, "f1": 1 / 7}
    models = dict.fromkeys(("server", "server+finetune", "personal", "tap"), metrics)
    tasks = dict.fromkeys(("digits", "languages"), models)
    found = results(
        preset="demo", method="tap", seed=config.seed, rounds=2, kinds=dict.fromkeys(tasks, "image_classification"),
        headlines=dict.fromkeys(tasks, Headline("accuracy", True)),
        clients={f"client-{n}": tasks for n in range(clients)}, replacements={},
        missing={"client-99": f"{run.resolve()}/clients/client-99 is damaged"}, marks={}, dropped={},
        bytes_={"down": 7, "up": 7, "per_component": {f"mote/{n}": {"down": n, "up": n} for n in range(160)}},
        steps={f"client-{n}": 1000 for n in range(clients)}, seconds={"total": 1 / 3},
    )  # fmt: skip
    run.mkdir(parents=True)
    (run / "results.json").write_text(json.dumps(found, indent=2))
    (run / "config.yaml").write_text(to_yaml(config))


def test_tables_are_made_again_from_small_files(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    sweep = read_sweep(tmp_path / "sweep.yaml", tmp_path / "out")
    config = sweep.runs[0].resolved
    config.data.root = str(tmp_path / "data")
    for run in sweep.runs:
        config.seed = run.seed
        write_run(run.folder, config, clients=30)
    keep([run.folder for run in sweep.runs], tmp_path / "kept")
    again = read_sweep(tmp_path / "sweep.yaml", tmp_path / "kept")
    assert all(run.done for run in again.runs)
    assert markdown(comparison_tables(compare(again))) == markdown(comparison_tables(compare(sweep)))
    files = sorted(path for path in (tmp_path / "kept").rglob("*") if path.is_file())
    names = ["tap/config.yaml", "tap/seed-1/results.json", "tap/seed-2/results.json"]
    assert [str(path.relative_to(tmp_path / "kept")) for path in files] == names
    assert all(path.stat().st_size < 20_000 for path in files)
    assert not [path for path in files if str(tmp_path) in path.read_text()]
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("3", "4"))
    with pytest.raises(ConfigError, match=r"seed-1 holds a run with another configuration \(train.steps differ\)"):
        read_sweep(tmp_path / "sweep.yaml", tmp_path / "kept")
    (tmp_path / "kept" / "tap" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="seed-1 holds results without config.yaml"):
        recorded(tmp_path / "kept" / "tap" / "seed-1")


def test_the_report_averages_kept_runs_of_one_configuration_alone(tmp_path: Path) -> None:
    for rounds in (2, 3):
        for seed in (1, 2):
            write_run(tmp_path / f"rounds-{rounds}" / f"seed-{seed}", Config(rounds=rounds, seed=seed), clients=1)
    runs = sorted(tmp_path.glob("rounds-*/seed-*"))
    keep(runs, tmp_path / "kept")
    found = read_runs([tmp_path / "kept" / run.relative_to(tmp_path) for run in runs] + runs[:1])
    assert [len(group) for group in groups(found)] == [3, 2]
    assert differences(found) == ["rounds"]
    assert "No bytes by component are recorded." in page(found)


def of_file(folder: str, rows: int = 8) -> Config:
    source = {"format": "csv", "path": f"{folder}/names.csv", "rows": [0, rows]}
    return Config(clients=[{"name": "ann", "tasks": [{"name": "t", "train": source}]}], seed=rows)


def test_clients_of_kept_runs_are_compared_wherever_their_files_lie() -> None:
    here, there, other = (portable(plain(of_file(*of))) for of in (("/home/ann", 8), ("/data", 8), ("/data", 9)))
    assert different(here, there) == []
    assert different(here, other) == ["clients"]
    assert portable(here) == here
    assert different(plain(of_file("/home/ann")), there) == different(there, plain(of_file("/home/ann"))) == []


def test_runs_of_files_in_other_folders_are_different(tmp_path: Path) -> None:
    assert different(plain(of_file("/2023")), plain(of_file("/2024"))) == ["clients"]
    old, new = ({"clients": [], "backbone": place, "data": {"root": ""}} for place in ("/a/flava", "/b/flava"))
    assert different(old, new) == ["backbone"]
    assert moved(old, new) == ("/a/flava", "/b/flava")
    assert moved(old, {**new, "clients": [1]}) is None
    places = {"a": "/2023", "b": "/2024", "c": "/2023"}
    for name, place in places.items():
        write_run(tmp_path / name / "seed-8", of_file(place), clients=1)
    keep([tmp_path / "b" / "seed-8"], tmp_path / "kept")
    runs = read_runs([tmp_path / name / "seed-8" for name in ("a", "b", "c", "kept/b")])
    # The kept run may be of either place, so it is averaged with none.
    assert groups(runs) == [[runs[0], runs[2]], [runs[1]], [runs[3]]]
    assert differences(runs) == ["clients"]


def test_a_run_of_files_in_another_folder_is_not_taken_for_this_one(tmp_path: Path) -> None:
    def sweep_of(folder: str) -> Sweep:
        source = {"format": "csv", "path": f"{folder}/names.csv"}
        task = {**LANGUAGES, "train": source, "test": source}
        (tmp_path / "clients.yaml").write_text(yaml.safe_dump({"clients": [{"name": "ann", "tasks": [task]}]}))
        return read_sweep(tmp_path / "sweep.yaml", tmp_path / "out")

    (tmp_path / "sweep.yaml").write_text("seeds: [8]\nmethods: [tap]\nconfig: clients.yaml\n")
    (run,) = sweep_of("2023").runs
    write_run(run.folder, run.resolved, clients=1)
    assert sweep_of("2023").runs[0].done
    lay = rf"\(clients differ\): .*; its files lay in {tmp_path}/2023/names.csv, now in {tmp_path}/2024/names.csv: if"
    with pytest.raises(ConfigError, match=lay):
        sweep_of("2024")


def test_what_has_been_kept_stays_as_it_is(tmp_path: Path) -> None:
    write_run(tmp_path / "tap" / "seed-1", Config(seed=1), clients=1)
    before = (tmp_path / "tap" / "seed-1" / "results.json").read_text()
    keep([tmp_path / "tap" / "seed-1"], tmp_path)
    assert (tmp_path / "tap" / "seed-1" / "results.json").read_text() == before


def test_an_option_that_a_kept_run_did_not_know_is_the_default() -> None:
    new = portable(plain(Config()))
    old = {**new, "replacement": {key: value for key, value in new["replacement"].items() if key != "evidence"}}
    assert different(old, new) == []
    assert different(old, {**new, "replacement": {**new["replacement"], "evidence": "training"}}) == [
        "replacement.evidence"
    ]
