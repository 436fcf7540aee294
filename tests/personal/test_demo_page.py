"""The page for trying models, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tap_flower.personal.demo_page import serve
from tap_flower.personal.personal_model import PersonalModel
from tap_flower.run.flower import free_port
from tests.personal.test_personal_model import rows
from tests.report import test_browser

browser = test_browser.browser
pytestmark = test_browser.pytestmark
PATIENCE = 60.0
"""Seconds after which what the page was to show is missing."""


@pytest.fixture
def address(run: Path) -> Iterator[str]:
    port = free_port()
    blocks = serve(run, port)
    yield f"http://127.0.0.1:{port}"
    blocks.close()


def choose(browser: Any, part: str, value: str) -> None:
    """Takes a value of a dropdown."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    field = browser.find_element(By.CSS_SELECTOR, f"#{part} input")
    field.click()
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(value)
    field.send_keys(Keys.ENTER)


def value_of(browser: Any, selector: str) -> str:
    return str(browser.execute_script("return document.querySelector(arguments[0])?.value ?? ''", selector))


def test_models_are_compared_in_a_browser(browser: Any, address: str, run: Path, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, PATIENCE)
    rows("shapes")[0]["image"].save(tmp_path / "shape.png")
    browser.set_window_size(1200, 1000)
    browser.get(address)
    wait.until(lambda b: value_of(b, "#task input") == "shapes")

    # A file that the user uploads is classified by each of the three models.
    browser.find_element(By.CSS_SELECTOR, "#image input[type=file]").send_keys(str(tmp_path / "shape.png"))
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#image img"))
    browser.find_element(By.ID, "ask").click()
    for number, which in enumerate(("server", "personal", "tap")):
        answer = PersonalModel.load(run / "clients" / "ann", which).predict("shapes", tmp_path / "shape.png")
        column = browser.find_element(By.ID, f"answer-{number}")
        wait.until(lambda _, column=column: "%" in column.text)
        assert column.text.startswith(which)
        assert answer.label in column.text
        assert f"{answer.probability:.0%}" in column.text

    # A test item of the report, a text: another client and task.
    choose(browser, "client", "bob")
    wait.until(lambda b: value_of(b, "#task input") == "languages")
    assert not browser.find_elements(By.CSS_SELECTOR, "#image img")
    choose(browser, "item", "test item 1")
    wait.until(lambda b: value_of(b, "#text textarea") == rows("names")[0]["text"])
    browser.find_element(By.ID, "ask").click()
    answer = PersonalModel.load(run / "clients" / "bob").predict("languages", text=rows("names")[0]["text"])
    column = browser.find_element(By.ID, "answer-2")
    wait.until(lambda _: f"{answer.probability:.0%}" in column.text and answer.label in column.text)

    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(asked) > 5
    assert [name for name in asked if not name.startswith((address, "data:", "blob:"))] == []
