from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from tap_flower.core.headline import Headline
from tap_flower.report.result_tables import Table, clients_table, headline_table, side_by_side
from tap_flower.report.results import remarks, results, scores
from tap_flower.report.run_record import RunRecord
from tap_flower.report.terminal_tables import terminal
from tap_flower.report.verdict import verdict


def of_ones_own(seed: int = 1) -> dict[str, Any]:
    """Results of two clients with a task of a kind that the package does not know, judged by its hits."""
    models = {"server": {"loss": 0.1, "hits": 2.0}, "tap": {"loss": 0.9, "hits": 4.0}}
    more = {model: {"loss": metrics["loss"], "hits": metrics["hits"] + 2} for model, metrics in models.items()}
    return results(
        preset="demo", method="tap", seed=seed, rounds=3, clients={"ann": {"match": models}, "bob": {"match": more}},
        kinds={"match": "matching"}, headlines={"match": Headline("hits", True)},
        replacements={}, bytes_={"down": 1, "up": 1, "per_component": {}}, steps={}, missing={}, marks={}, dropped={},
        seconds={"total": 1.0},
    )  # fmt: skip


def test_a_kind_of_ones_own_is_shown_and_judged_by_its_headline() -> None:
    found = of_ones_own()
    assert found["tasks"]["match"]["tap"]["worst"] == 4.0
    assert scores(found, "tap") == {"match": 5.0}
    table = headline_table([found])
    assert table.rows == [["match", "hits ↑", "3.000", "5.000", "0"]]
    assert table.best == {(0, 3)}
    over_clients = clients_table([found])
    assert over_clients is not None
    assert over_clients.rows[0] == ["match", "worst client, hits ↑", "2.000", "4.000"]
    run = RunRecord("one", found, [], "", {})
    assert side_by_side([[run]]).rows == [["match", "server", "hits ↑", "3.000"], ["match", "tap", "hits ↑", "5.000"]]
    assert verdict([[run]])[0].startswith("TAP beats the federated model on its only task, match")


def test_a_task_that_stage_two_made_worse_is_told() -> None:
    found = of_ones_own()
    models = found["tasks"]["match"]
    models["personal"], models["server"]["hits"] = {"hits": 6.5, "loss": 0.1}, 5.5
    assert remarks(found) == [
        "task 'match': stage 2 made the test result worse: hits is 5 after it, and was 6.5 (personal) and 5.5 (server)"
    ]
    models["server"]["hits"] = 5.0
    assert remarks(found) == []


def test_answers_that_could_not_be_used_are_told() -> None:
    assert remarks(of_ones_own() | {"dropped": {"client 'ann'": 2}}) == [
        "client 'ann': 2 answers could not be used; the events `dropped` of metrics.jsonl say why"
    ]


def test_results_that_do_not_say_the_headline_know_the_packages_own_kinds() -> None:
    found = of_ones_own()
    del found["headlines"]
    assert headline_table([found]).rows[0][1] == "loss ↓"
    found["kinds"] = {"match": "text_generation"}
    for by_model in (found["tasks"]["match"], *(client["match"] for client in found["clients"].values())):
        for metrics in by_model.values():
            metrics["exact_match"] = 0.5
    assert headline_table([found]).rows[0][1:4] == ["exact_match ↑", "0.500", "0.500"]


def test_no_number_is_cut_on_a_narrow_terminal() -> None:
    numbers = [f"0.{n}61 ± 0.022" for n in range(9)]
    table = Table("", ["task", "metric", *(f"m{n}+finetune" for n in range(9))], [["dates", "exact match", *numbers]])
    console = Console(file=StringIO(), width=40, record=True)
    console.print(terminal(table), crop=False)
    printed = console.export_text()
    assert "…" not in printed
    assert all(number.split()[0] in printed for number in numbers)
