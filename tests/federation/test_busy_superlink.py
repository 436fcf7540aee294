"""A SuperLink that is busy, or refuses a message."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from flwr.app import Message

from tap_flower.report.events import read_events
from tap_flower.server import grid as exchange
from tests.federation.runs import (
    is_train,
    without_times,
)
from tests.federations import (
    ToyFederation,
    Whole,
)
from tests.grid import Playback, Replies, round_of


def test_a_busy_superlink_is_asked_again(
    federation: ToyFederation, replies: Replies, whole_toys: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_AGAIN", 0.0)
    grid, failures = Playback(replies), {"get_node_ids": 2, "push_messages": 1, "pull_messages": 3}
    for name in list(failures):
        real = getattr(grid, name)

        def busy(*arguments: Any, real: Any = real, name: str = name) -> Any:
            failures[name] -= 1
            if failures[name] >= 0:
                request = httpx.Request("POST", "https://superlink")
                raise httpx.HTTPStatusError("busy", request=request, response=httpx.Response(500, request=request))
            return real(*arguments)

        monkeypatch.setattr(grid, name, busy)
    assert without_times(federation.strategy().start(grid).summary) == without_times(whole_toys.results)
    assert all(count < 0 for count in failures.values())


def test_a_message_that_the_superlink_does_not_take_is_told(federation: ToyFederation, replies: Replies) -> None:
    class Refusing(Playback):
        def push_messages(self, asked: Iterable[Message]) -> Iterable[str]:
            (message,) = asked
            lost = is_train(message) and message.metadata.dst_node_id == 101
            return [""] if lost and round_of(message) == 1 else super().push_messages([message])

    federation.strategy().start(Refusing(replies))
    dropped = [(e["who"], e["problem"]) for e in read_events(federation.out) if e["event"] == "dropped"]
    assert dropped == [
        (
            "client 'bob'",
            "the SuperLink did not take the message, with 0.00334 MB of tensors: its log says why",
        )
    ]


@pytest.mark.parametrize(("status", "patience"), [(403, 60.0), (500, 0.0)])
def test_a_superlink_that_refuses_or_stays_busy_ends_the_run(
    status: int, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_PATIENCE", patience)
    request = httpx.Request("POST", "https://superlink")

    def refuse() -> None:
        raise httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, request=request))

    with pytest.raises(httpx.HTTPStatusError):
        exchange.patiently(refuse)
