"""The report in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tap_flower.report.html_report import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="Chromium is missing: apt-get install chromium chromium-driver"
    ),
]
FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def emulate(browser: Any, width: int, scheme: str) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_the_report_in_a_browser(browser: Any, small_run: Path, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    file = tmp_path / "report.html"
    again = shutil.copytree(small_run, tmp_path / "again")
    results = json.loads((again / "results.json").read_text())
    (again / "results.json").write_text(json.dumps({**results, "seed": results["seed"] + 1}))
    write_report([small_run, again], file)
    papers = {}
    for scheme in ("light", "dark"):
        for width in (1200, 360):
            emulate(browser, width, scheme)
            browser.get(file.as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        papers[scheme] = browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    assert papers["light"] != papers["dark"]

    emulate(browser, 1200, "light")
    browser.get(file.as_uri())
    tip = browser.find_element(By.ID, "tip")
    assert not tip.is_displayed()
    chart = browser.find_element(By.CSS_SELECTOR, "#clients-1 svg.chart")
    chart.send_keys(Keys.ARROW_RIGHT)
    frame = "requestAnimationFrame"
    waited = f"return new Promise(done => {frame}(() => {frame}(() => {frame}(done))))"
    browser.execute_script(waited)
    assert tip.is_displayed()
    first = tip.text
    assert "client-" in first
    chart.send_keys(Keys.ARROW_RIGHT)
    browser.execute_script(waited)
    assert tip.text not in ("", first)
    chart.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()

    button = browser.find_element(By.CSS_SELECTOR, "#rounds-1 .legend button")
    series = browser.find_element(By.CSS_SELECTOR, "#rounds-1 .series")
    assert series.is_displayed()
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert not series.is_displayed()
    button.click()
    assert series.is_displayed()
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
