"""The documentation's site: it builds without a warning, loads nothing from another host, and its drawings are right."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from tap_flower.client.client_model import client_model
from tap_flower.config import client_specs, load_config
from tap_flower.core.components import ComponentMap
from tap_flower.models.load import outline

from .docs_blocks import ROOT

IMAGES = ROOT / "docs" / "images"
LOADS = {"src", "srcset", "data", "poster", "background", "action", "xlink:href"}
"""Attributes whose value a browser fetches, on whatever tag; `href` only on some."""
HARMLESS = {"canonical", "next", "prev", "alternate"}
"""Relations of a `link` that are not fetched."""
ELSEWHERE = re.compile(r"(?:https?:)?//", re.IGNORECASE)
IN_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?\s*((?:https?:)?//[^\"')\s]*)", re.IGNORECASE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Page(HTMLParser):
    """Collects what a page fetches from elsewhere, and its images without a text alternative."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.foreign: list[str] = []
        self.unnamed: list[str] = []
        self.feed(text)
        self.foreign += IN_STYLE.findall(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        fetched = [value for name, value in values.items() if name in LOADS]
        if tag not in {"a", "area", "base"} and not set(values.get("rel", "").split()) & HARMLESS:
            fetched.append(values.get("href", ""))
        self.foreign += [value for value in fetched if ELSEWHERE.match(value)]
        if tag == "img" and not values.get("alt"):
            self.unnamed.append(values.get("src", ""))
        if "mermaid" in values.get("class", ""):
            self.foreign.append("mermaid, which the theme fetches from a network")


def foreign(site: Path) -> Iterator[str]:
    """What the site's files fetch from elsewhere."""
    for path in site.rglob("*"):
        if path.suffix == ".html":
            yield from (f"{path}: {url}" for url in Page(path.read_text()).foreign)
        elif path.suffix in {".css", ".svg"}:
            yield from (f"{path}: {url}" for url in IN_STYLE.findall(path.read_text()))


@pytest.mark.slow
def test_the_site_loads_nothing_from_another_host(site: Path) -> None:
    assert len(list(site.rglob("*.html"))) > 20
    assert list(foreign(site)) == []


def test_what_a_page_would_load_from_another_host_is_found(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        '<link rel="stylesheet" href="https://a/x.css"><link rel="canonical" href="https://b/"><a href="https://c/">c</a>'
        '<script src="//d/x.js"></script><img src="x.png" alt="x"><img srcset="http://e/x 2x" alt="e">'
        '<p style="background: url(https://f/x)"></p><style>@import "https://g/x.css"</style>'
    )
    (tmp_path / "page.css").write_text("@font-face { src: url('https://h/x.woff2') } p { background: url(x.png) }")
    found = sorted(re.findall(r"//(\w)/", " ".join(foreign(tmp_path))))
    assert found == ["a", "d", "e", "f", "g", "h"]


@pytest.mark.slow
def test_every_image_has_a_text_alternative(site: Path) -> None:
    assert {path.name: found for path in site.rglob("*.html") if (found := Page(path.read_text()).unnamed)} == {}


@pytest.mark.slow
def test_the_reference_has_the_public_names(site: Path) -> None:
    pages = {path.parent.name: path.read_text() for path in (site / "api").rglob("index.html")}
    for page, name in (
        ("core", "tap_flower.core.replacement.decide"),
        ("core", "tap_flower.core.averaging.Averaging.add"),
        ("methods", "tap_flower.methods.method.Method"),
        ("models", "tap_flower.models.fusion.paths"),
        ("public", "tap_flower.client.app.TapClientApp"),
        ("public", "tap_flower.client.task.Client.session"),
        ("public", "tap_flower.server.strategy.TapStrategy.start"),
        ("server", "tap_flower.server.server_run.ServerRun"),
        ("wire", "tap_flower.wire.messages.Manifest"),
        ("results", "tap_flower.report.results.read_results"),
    ):
        assert f'id="{name}"' in pages[page], f"{name} is not on the page {page}"


@functools.cache
def component_map(client: str) -> ComponentMap:
    """Of a client of the demo."""
    config = load_config("demo")
    (spec,) = [spec for spec in client_specs(config) if spec.name == client]
    with torch.device("meta"):
        return client_model(outline("demo", config.model.layers), spec, config.model.text_length).component_map


def test_the_drawing_of_holders_is_right() -> None:
    drawing = ElementTree.parse(IMAGES / "pairs.svg").getroot()
    dots = {(e.get("data-client"), e.get("data-component")) for e in drawing.iter() if e.get("data-client")}
    texts = [e.text or "" for e in drawing.iter() if e.tag.endswith("}text")]
    clients = [text for text in texts if text.startswith("client-")]
    rows = [text for text in texts if re.fullmatch(r"[a-z_]+(/[a-z_]+)+", text)]
    assert (clients, len(rows)) == (["client-0", "client-1", "client-2", "client-3"], 15)
    held = {name: set(component_map(name).component_of.values()) for name in clients}
    assert dots == {(client, row) for client in clients for row in rows if row in held[client]}
    shown = {str(pair) for client in clients for pair in component_map(client).reach}
    assert shown == {text for text in texts if ":" in text and " " not in text}
    everyone = {c for spec in client_specs(load_config("demo")) for c in component_map(spec.name).component_of.values()}
    assert f"component ({len(rows)} of the demo's {len(everyone)})" in texts


def test_the_drawing_of_a_pairs_components_is_right() -> None:
    """A disc stands before what the client's other pair reaches too, a ring before the rest."""
    elements = list(ElementTree.parse(IMAGES / "components.svg").getroot())
    marked: dict[str, str] = {}
    for mark, text in itertools.pairwise(elements):
        if mark.tag.endswith("circle") and text.get("class") == "code":
            marked[text.text or ""] = mark.get("class", "")
    reach = {str(pair): components for pair, components in component_map("client-3").reach.items()}
    shared = reach["image:digits"] & reach["text:languages"]
    assert marked == {name: "dot" if name in shared else "ring" for name in reach["image:digits"]}
