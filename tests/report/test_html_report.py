from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tap_flower.core.components import Pair
from tap_flower.core.replacement import Decision
from tap_flower.errors import StorageError
from tap_flower.report.client_records import DECISIONS, GRADIENTS, read_decisions, record_decisions
from tap_flower.report.figures import decision_figures
from tap_flower.report.html_report import page, write_report
from tap_flower.report.run_record import read_run
from tap_flower.report.svg import number, scale, ticks

from .conftest import HOSTILE, write_run


class Elements(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.13, 0.91, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1, 200, [0, 50, 100, 150, 200]),
        (-3, 4, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round_and_hold_everything(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_ticks_of_one_value_stand_around_it() -> None:
    found = ticks(2.0, 2.0)
    assert found[0] < 2 < found[-1]


def test_a_scale_is_linear() -> None:
    assert [scale(0, 10, 100, 0)(value) for value in (0, 2.5, 10)] == [100, 75, 0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (123.45, "123.5"),
        (12345, "12345"),
        (1e-5, "1.00e-05"),
        (0, "0.000"),
        (None, "–"),
        (float("inf"), "–"),
    ],
)
def test_numbers_for_people(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_large_run_gives_a_small_file(large_run: Path, tmp_path: Path) -> None:
    write_report([large_run], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 5_000_000


def test_nothing_is_loaded_and_names_are_escaped(small_run: Path) -> None:
    text = page([read_run(small_run), read_run(small_run)])
    assert "http://" not in text
    assert "https://" not in text
    elements = Elements(text).found
    assert [tag for tag, _ in elements if tag == "script"] == ["script"]
    for tag, attributes in elements:
        for name in ("src", "href"):
            value = attributes.get(name) or "data:"
            assert value.startswith(("data:", "#")), (tag, value)
        assert not [name for name in attributes if name.startswith("on")]
    assert "<script>alert" not in text
    assert "{{ 7 * 7 }}" in text  # nothing was rendered as a template
    assert "&lt;script&gt;alert(1)" in text


def test_what_the_page_says(small_run: Path) -> None:
    text = page([read_run(small_run)])
    assert "(higher is better)" in text
    assert "squared error, normalised pixels (lower is better)" in text
    assert "margin 0.01: replaced" in text
    assert 'data-of="round "' in text.replace("&#39;", "'")
    assert "against –, margin" in text  # there was no personal model before the first participation
    assert '<td class="opposed" style="--shade:36%">-0.500' in text  # 8 + 55 · 0.5, rounded to even
    assert '<td class="along" style="--shade:63%">1.590' in text  # MB of the largest component
    for tag, attributes in Elements(text).found:
        if tag == "svg" and "chart" in (attributes.get("class") or ""):
            assert attributes["aria-label"]
            assert attributes["role"] == "img"
        assert tag != "img" or attributes["alt"]


def test_a_client_whose_folder_is_elsewhere(small_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    shutil.rmtree(run / "clients" / "client-2")
    assert "Kept on the node: client-2." in page([read_run(run)])


def test_bytes_of_first_values_are_told_where_there_are_any(small_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    found = json.loads((run / "results.json").read_text())
    found["bytes"]["first_values"] = {"down": 4_200_000, "up": 0}
    (run / "results.json").write_text(json.dumps(found))
    assert "first values: 4.2 MB to clients, 0.0 MB back." in page([read_run(run)])
    assert "first values" not in page([read_run(small_run)])


def test_a_damaged_record_is_an_error(small_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    (run / "clients" / "client-1" / DECISIONS).write_text("{\n")
    with pytest.raises(StorageError, match=r"decisions.jsonl is damaged in line 1"):
        read_run(run)
    (run / "clients" / "client-1" / DECISIONS).unlink()
    (run / "clients" / "client-1" / GRADIENTS).write_text('{"pairs": 3}')
    with pytest.raises(StorageError, match=r"gradients.json is damaged in pairs: .* remove the file to go on"):
        read_run(run)


def test_a_repeated_round_replaces_its_decisions(tmp_path: Path) -> None:
    pair = Pair("digits", ("image",))
    for run, server_round, teacher in (("a", 1, 9.0), ("b", 1, 1.0), ("b", 3, 2.0), ("b", 5, 3.0), ("b", 3, 4.0)):
        record_decisions(tmp_path, run, server_round, [Decision(pair, teacher, float("inf"), 0.01, 1.0)])
    found = [(d.run, d.round, d.teacher_loss, d.personal_loss, d.replaced) for d in read_decisions(tmp_path)]
    assert found == [("b", 1, 1.0, None, True), ("b", 3, 4.0, None, True)]


def test_the_decisions_of_stage_2_are_in_the_picture(tmp_path: Path) -> None:
    run = write_run(tmp_path, 1, 3)
    for after in (1, 2):
        decision = Decision(Pair("languages", ("text",)), 0.5, 0.75, 0.01, 0.25)
        record_decisions(run / "clients" / "client-0", "run", 3 + after, [decision])
    figure = next(f for f in decision_figures(read_run(run), "client-0") if f.title == "languages")
    assert [row[0] for row in figure.table.rows[-2:]] == ["4, before stage 2", "5, after stage 2"]
    assert "5, after stage 2: 0.500 against 0.750, margin 0.01: mixed, α = 0.25" in figure.chart
    width = int(re.search(r'viewBox="0 0 (\d+)', figure.chart)[1])  # type: ignore[index]
    assert max(float(x) for x in re.findall(r'cx="([0-9.]+)"', figure.chart)) < width


def test_hostile_names_reach_the_page_whole(small_run: Path) -> None:
    assert HOSTILE in read_run(small_run).results["kinds"]
