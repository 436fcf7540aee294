"""Sending a message to each of some nodes, and getting the replies as they come."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

FOREIGN = 1003
"""Error code that stands for a reply which is none: not of the node that was asked, or not its first."""
_POLL, _LONGEST_POLL = 0.1, 1.0
"""Seconds between looks for replies: half as long again after each look in vain. Ten looks a second took a SuperLink with
TLS and a database 44 % of a core."""
_PATIENCE, _AGAIN = 60.0, 2.0
"""Seconds for which a SuperLink that answers with an error of its own is asked again, and between two times."""
log = logging.getLogger("tap_flower")
T = TypeVar("T")


def exchange(
    grid: Grid,
    nodes: Mapping[str, int],
    content: Callable[[str], RecordDict],
    message_type: str,
    group: int,
    timeout: float,
) -> Iterator[tuple[str, Message | None]]:
    """Sends one message to each node and yields the replies in the order of their arrival.

    Args:
        grid: Flower's.
        nodes: client name -> node id.
        content: client name -> content of its message; called once a client, when it is sent.
        message_type: one of `messages`.
        group: number of the round.
        timeout: seconds until those that have not answered are given up.

    Yields:
        (client name, its reply), and in the end (client name, None) for each that did not answer. A second reply, and one of
        another node, is replaced by an error that says so.
    """
    waiting: dict[str, str] = {}
    answered: dict[str, str] = {}
    for name, node in nodes.items():
        # One at a time: only one client's payload is in memory. A node that comes back later does not find it any more.
        message = Message(
            content=content(name), dst_node_id=node, message_type=message_type, group_id=str(group), ttl=timeout
        )
        for message_id in patiently(lambda: grid.push_messages([message])):  # noqa: B023
            waiting[message_id] = name
    deadline, pause = time.monotonic() + timeout, _POLL
    while waiting and time.monotonic() < deadline:
        arrived = list(patiently(lambda: grid.pull_messages(list(waiting))))
        for reply in arrived:
            message_id = reply.metadata.reply_to_message_id or ""
            sender = waiting.get(message_id) or answered.get(message_id)
            if sender is not None:
                problem = _problem(reply, nodes[sender], message_id in answered)
                if problem:
                    yield sender, Message(Error(FOREIGN, problem), reply_to=reply)
                    continue
                answered[message_id] = waiting.pop(message_id)
                yield sender, reply
        pause = _POLL if arrived else min(1.5 * pause, _LONGEST_POLL)
        if waiting and not arrived:
            time.sleep(pause)
    for silent in waiting.values():
        yield silent, None


def _problem(reply: Message, asked: int, again: bool) -> str | None:
    """Why a reply is not one of the node that was asked, or None. An error may be the server's own word about a node."""
    sender = reply.metadata.src_node_id
    if sender != asked and not reply.has_error():
        return f"node {sender} answered for it; its own node is {asked}"
    return "it answered a second time" if again else None


def patiently(ask: Callable[[], T]) -> T:
    """Asks the SuperLink again while it answers with an error of its own (5xx), such as that its database is busy.

    A message that was pushed twice is one message, since its identity comes from its content.

    Args:
        ask: a call of the grid.

    Raises:
        httpx.HTTPStatusError: it still does so after a minute, or refuses.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return ask()
        except httpx.HTTPStatusError as error:
            if not error.response.is_server_error or time.monotonic() > deadline:
                raise
            log.warning("the SuperLink answers with %d: asking again", error.response.status_code)
            time.sleep(_AGAIN)
