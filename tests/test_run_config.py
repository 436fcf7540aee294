from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tap_flower.config.run_config import NotedConfig


@pytest.mark.parametrize(
    ("read", "unread"),
    [
        (lambda noted: noted["lr"], ("epochs",)),
        (lambda noted: noted.get("lr"), ("epochs",)),
        (lambda noted: "lr" in noted, ("epochs",)),
        (lambda noted: noted.get("momentum", 0.9), ("epochs", "lr")),
        (lambda noted: noted.pop("lr"), ("epochs",)),
        (lambda noted: noted.setdefault("lr", 1.0), ("epochs",)),
        (list, ()),
        (lambda noted: noted.copy(), ()),
        (lambda noted: list(noted.keys()), ()),
        (lambda noted: list(noted.values()), ()),
        (lambda noted: list(noted.items()), ()),
        (lambda noted: {**noted}, ()),
    ],
)
def test_what_is_read_of_a_run_configuration_is_noted(
    read: Callable[[NotedConfig], Any], unread: tuple[str, ...]
) -> None:
    values = {"lr": 0.1, "epochs": 2}
    noted = NotedConfig(values)
    assert noted.unread == ("epochs", "lr")
    assert read(noted) == read(dict(values))  # type: ignore[arg-type]
    assert noted.unread == unread
