"""The environment of Flower's processes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import httpx
import pytest

from tap_flower.run import simulation
from tap_flower.run.flower import environment

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[int]:
    """The port of a server on this machine."""

    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Healthy) as found:
        Thread(target=found.serve_forever, daemon=True).start()
        yield found.server_port
        found.shutdown()


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_nobody_asks_a_proxy_for_this_machine(server: int, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    assert simulation._answers(server)
    found = environment()
    assert found[name] == "http://127.0.0.1:9"
    for variable in PROXIES:
        for spelled in (variable, variable.upper()):
            if spelled in found:
                monkeypatch.setenv(spelled, found[spelled])
    assert httpx.get(f"http://127.0.0.1:{server}/health").is_success  # as Flower's processes ask


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_colours_are_not_forced_upon_what_is_read(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    code = "from rich.console import Console; Console().print_json('{\"a\": 1}')"
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(said) == {"a": 1}


def test_what_was_not_to_be_asked_a_proxy_for_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "hospital.example")
    assert environment()["no_proxy"] == environment()["NO_PROXY"] == "hospital.example,127.0.0.1,localhost,::1"


@pytest.mark.skipif(importlib.util.find_spec("socksio") is not None, reason="socksio is installed")
def test_proxies_that_cannot_be_used_are_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    found = environment()
    assert "ALL_PROXY" not in found
    assert found["http_proxy"] == "http://127.0.0.1:9"
    assert (
        "ALL_PROXY is not passed on to Flower's processes, as it cannot be used: Using SOCKS proxy, but" in caplog.text
    )
    subprocess.run([sys.executable, "-c", "import httpx; httpx.Client()"], env=found, check=True)


def test_rays_sockets_have_a_short_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/short")
    assert "RAY_TMPDIR" not in environment()
    monkeypatch.setattr(tempfile, "tempdir", "/" + "long" * 20)
    assert environment()["RAY_TMPDIR"] == "/tmp"
    monkeypatch.setenv("RAY_TMPDIR", "/mine")
    assert environment()["RAY_TMPDIR"] == "/mine"
