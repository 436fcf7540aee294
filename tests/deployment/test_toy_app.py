"""The app of the other tests here: what it imports, and that it takes part in a run to the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .toy import APP, undisturbed
from .toy_app.toy.client_app import TASKS

RUN = """
import json, sys
import torch
from flwr.app import Context, RecordDict
from tap_flower.run.in_process import InProcessGrid
from toy.client_app import TASKS, app as client
from toy.server_app import app as server
folder, settings = sys.argv[1:]
run_config = {"preset": "plug-in", "set": settings, "out": folder + "/run"}
nodes = [{"client": name, "state-dir": folder + "/state", "faults": folder} for name in TASKS]
server(InProcessGrid(client, nodes, run_config), Context(1, 1, {}, RecordDict(), run_config))
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_a_whole_run_imports_neither_transformers_nor_datasets(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), "rounds=1 clients_per_round=4 train.steps=2 distill.iterations=2"],
        cwd=APP,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"torch", "flwr", "toy"} <= imported
    assert not imported & {"transformers", "datasets", "tokenizers", "pyarrow", "pandas", "PIL", "ray", "client_app"}
    assert json.loads((tmp_path / "run" / "results.json").read_text())["clients"].keys() == TASKS.keys()


def test_a_run_finds_the_same_again(tmp_path: Path) -> None:
    """Else a comparison with a run that was disturbed would prove nothing. Each round finds something else."""
    names = ["ann", "bob", "cleo"]
    first, second, shorter = (
        undisturbed(tmp_path / name, names, f"rounds={rounds} clients_per_round=3")
        for name, rounds in (("first", 3), ("second", 3), ("shorter", 2))
    )
    assert first == second
    for name in names:
        (task,) = first["clients"][name]
        assert task == TASKS[name]
        assert first["clients"][name][task].keys() == {"server", "server+finetune", "personal", "tap"}
        assert all(first["clients"][name][task][m] != shorter["clients"][name][task][m] for m in ("server", "personal"))
    counts = {count for client in first["replacements"].values() for count in client.values()}
    assert len(counts) > 1, "all clients replaced in the same rounds: choose another learning rate"
