"""What crosses the line between node and server.

Nothing that a server sends chooses what a node reads or runs. No message of a node holds a sample, a name of a class or of a
column, or a path.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.common.serde import recorddict_to_proto

from tap_flower.errors import RunError
from tap_flower.wire.messages import EVALUATE, MANIFEST, PERSONALISE, TRAIN
from tests.federations import CLIENTS, Federation, MakeSpecs

from .watched_node import CANARY, watch

ROOT = Path(__file__).parents[2]
SECRET = "zanzibar"
"""In every text, class, column and path of the client."""


def write_client(folder: Path, labels: tuple[str, str] = ("yes", "no")) -> Path:
    """A client spec and its data, 12 rows; the words are secret."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{SECRET}.csv"
    with data.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([f"{SECRET}_text", f"{SECRET}_label"])
        for number in range(12):
            rows.writerow([f"{SECRET} {number} lies in the sea", f"{SECRET} {labels[number % 2]}"])
    source = {"format": "csv", "path": str(data)}
    task = {
        "name": "triage", "kind": "text_classification", "modalities": ["text"], "domain": "notes",
        "classes": [f"{SECRET} yes", f"{SECRET} no"], "train": source, "test": source,
        "columns": {"label": f"{SECRET}_label"}, "templates": {"text": f"{{{{ {SECRET}_text }}}}, {SECRET}?"},
    }  # fmt: skip
    spec = folder / "ann.yaml"
    spec.write_text(yaml.safe_dump({"name": "ann", "backbone": "demo", "tasks": [task]}))
    return spec


@pytest.fixture(scope="module", params=["this process", pytest.param("a fresh interpreter", marks=pytest.mark.slow)])
def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a node, and what it did; a fresh interpreter has imported nothing, and has a home of its own."""
    folder = tmp_path_factory.mktemp("node").resolve()
    write_client(folder)
    (folder / CANARY).mkdir()
    (folder / CANARY / "config.json").write_text("{}")
    if request.param == "this process":
        return folder, watch(folder, [TRAIN])
    home = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "HF_HOME": str(folder / "home")}
    for path in set(home.values()):
        Path(path).mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.federation.watched_node", str(folder), MANIFEST, TRAIN, PERSONALISE, EVALUATE],
        cwd=ROOT,
        env={**os.environ, **home, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_hostile_messages_open_nothing_outside_of_the_nodes_own_folders(watched: tuple[Path, dict[str, Any]]) -> None:
    folder, found = watched
    programs = [sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(ROOT)]
    allowed = (*programs, str(folder / "state"), "/proc/", "/dev/null", "/dev/urandom")
    opened = [rest for event, rest in found["hostile"] if event == "open"]
    # They are refused before the client spec is read; the hook sees it read for honest ones.
    assert not any(rest.startswith(str(folder / "ann.yaml")) for rest in opened)
    assert any(event == "open" and rest.startswith(str(folder / "ann.yaml")) for event, rest in found["honest"])
    assert [rest for rest in opened if rest.startswith("/") and not rest.startswith(allowed)] == []
    assert [event for event in found["hostile"] if CANARY in event[1]] == []


def test_hostile_messages_start_no_process_and_no_connection(watched: tuple[Path, dict[str, Any]]) -> None:
    _, found = watched
    read = ("open", "import", "os.listdir", "os.scandir")
    assert [event for event in found["hostile"] if event[0] not in read] == []


def test_every_hostile_message_is_refused_in_plain_words(watched: tuple[Path, dict[str, Any]]) -> None:
    _, found = watched
    # 8 words for each of 7 keys that are none, and two trackers that exist, at two places; for the run; for 7 texts.
    each = 2 * (7 * 8 + 2) + 8 + 7 * 8
    assert len(found["answers"]) in (each, 4 * each)  # of one type, of all
    told = ("the server:", "unknown method")
    assert [answer for answer in found["answers"] if not answer.startswith(told)] == []


def test_honest_messages_reach_no_other_machine_and_no_path_of_the_run_configuration(
    watched: tuple[Path, dict[str, Any]],
) -> None:
    _, found = watched
    # Its data are read by a library that opens files by itself; the client spec is seen.
    assert any(str(event[1]).split()[0].endswith(".yaml") for event in found["honest"] if event[0] == "open")
    assert [
        event for event in found["honest"] if event[0].startswith(("socket.", "pickle.")) or CANARY in event[1]
    ] == []


@pytest.fixture
def federation(make_spec_federation: MakeSpecs) -> Federation:
    """Of one node; the server knows no client spec."""
    return make_spec_federation(CLIENTS[:1], "clients=[]", "train.steps=1", "distill.iterations=1")


def deployed(federation: Federation, spec: Path) -> Any:
    """A grid of one node that has a client spec, as in a deployment."""
    grid = federation.grid()
    grid.contexts[100].node_config = {"client-spec": str(spec), "state-dir": str(federation.folder / "state")}
    return grid


def wire(grid: Any) -> bytes:
    """All that was sent in both directions, as bytes."""
    parts = [
        recorddict_to_proto(m.content).SerializeToString() for m in [*grid.sent, *grid.received] if m.has_content()
    ]
    return b"".join([*parts, *(m.error.reason.encode() for m in grid.received if m.has_error())])


def test_no_message_holds_a_sample_or_a_name_from_the_data(federation: Federation, tmp_path: Path) -> None:
    grid = deployed(federation, write_client(tmp_path / SECRET))
    strategy = federation.strategy()
    strategy.start(grid)
    assert strategy.progress.dropped == {}
    sent = wire(grid)
    assert len(sent) > 100_000
    assert b"triage" in sent
    assert b"notes" in sent
    assert SECRET.encode() not in sent
    for file in federation.out.rglob("*"):  # what the server writes, its log of events included
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()
    (kept,) = (federation.folder / "state" / "ann").rglob("examples.json")
    assert SECRET in kept.read_text()  # the client's own record has them


@pytest.mark.parametrize("problem", ["label", "column", "file", "spec"])
def test_what_is_wrong_with_a_nodes_data_is_told_on_the_node_alone(
    federation: Federation, tmp_path: Path, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = write_client(tmp_path / SECRET, labels=("yes", "maybe" if problem == "label" else "no"))
    if problem != "label":
        old, new = {"column": ("_text }}", "_other }}"), "file": (".csv", ".tsv"), "spec": ("name: ann", "name: [")}[
            problem
        ]
        spec.write_text(spec.read_text().replace(old, new))
    grid = deployed(federation, spec)
    with pytest.raises(RunError, match="the log of the node says where"):
        federation.strategy().start(grid)
    assert SECRET.encode() not in wire(grid)
    assert SECRET in caplog.text


def test_an_unexpected_error_of_a_node_is_told_without_its_text(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tap_flower.data.batching import ClientData

    def fail(self: ClientData, split: str) -> dict[str, int]:
        raise KeyError(SECRET)

    monkeypatch.setattr(ClientData, "sizes", fail)
    grid = deployed(federation, write_client(tmp_path / SECRET))
    with pytest.raises(
        RunError, match=r"unexpected KeyError at test_node_boundary.py:\d+: the log of its node says more"
    ):
        federation.strategy().start(grid)
    assert SECRET.encode() not in wire(grid)
    assert SECRET in capsys.readouterr().err
