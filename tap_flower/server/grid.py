"""A Grid that hands on replies as they come, and says of every message what has become of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from tap_flower.errors import MessageError
from tap_flower.wire import messages

FOREIGN, SILENT, UNSENT = 1003, 1004, 1005
"""Error codes of replies that this grid makes: in place of one that is not of the node that was asked, or not its first;
for a node that has not answered in time; for a message that the SuperLink has not taken."""
_FIRST_POLL, _SHORTEST_POLL, _LONGEST_POLL = 0.1, 0.02, 1.0
"""Seconds between looks for replies: half as long after a look that found some, and half as long again after one in vain,
so that they follow the clients' pace. Ten looks a second took a SuperLink with TLS and a database 44 % of a core."""
_PATIENCE, _AGAIN = 60.0, 2.0
"""Seconds for which a SuperLink that answers with an error of its own is asked again, and between two times."""
log = logging.getLogger("tap_flower")
T = TypeVar("T")


class StreamingGrid(Grid):
    """Wraps Flower's grid, so that the server's memory does not grow with the number of messages.

    `send_and_receive` pushes messages one by one, so that a generator holds one client's payload at a time, and yields
    replies in the order of their arrival. Errors come from the node that was asked (`src_node_id`), whoever reports them.

    Args:
        grid: Flower's grid.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Any) -> None:
        """Sets the run of the wrapped grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run of the wrapped grid."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Makes a message, deprecated in Flower."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are there."""
        return list(patiently(self._grid.get_node_ids))

    def get_nodes(self) -> Iterable[Any]:
        """What Flower knows of the nodes that are there."""
        return list(patiently(self._grid.get_nodes))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pushes messages; returns their identities."""
        listed = list(messages)
        return list(patiently(lambda: self._grid.push_messages(listed)))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pulls the replies that have come to some messages."""
        listed = list(message_ids)
        return list(patiently(lambda: self._grid.pull_messages(listed)))

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Iterator[Message]:
        """Sends messages and yields a reply or an error for each, errors of silent nodes last.

        Where clients wait for each other, as in a simulation with fewer processes than clients, they may take long
        altogether. So the clock starts again whenever an answer comes, and a message that was sent as the n-th stays valid
        for n times the timeout.

        Args:
            messages: pushed one by one, as they are drawn.
            timeout: seconds without any answer until those that have not answered are given up; None waits as long as the
                messages' own `ttl`.
            meanwhile: called now and then where answers take long.
        """
        pending, unsent = Pending(self), list[Message]()
        longest = 0.0
        for number, message in enumerate(messages, 1):
            if timeout is not None:
                message.metadata.ttl = number * timeout
            longest = max(longest, message.metadata.ttl)
            if (refused := pending.send(message)) is not None:
                unsent.append(refused)
        yield from unsent
        pause, last = _FIRST_POLL, time.monotonic()
        while pending.waiting:
            before = len(pending.waiting)
            arrived = pending.collect()
            yield from arrived
            if len(pending.waiting) < before:
                last = time.monotonic()
            elif time.monotonic() > last + (longest if timeout is None else timeout):
                break
            if arrived:
                pause = max(pause / 2, _SHORTEST_POLL)
            elif pending.waiting:
                if pause == _LONGEST_POLL:
                    meanwhile()
                time.sleep(pause)
                pause = min(1.5 * pause, _LONGEST_POLL)
        for silent in pending.waiting.values():
            yield Message(Error(SILENT, "no answer in time (raise the timeout, or look at the node)"), reply_to=silent)


class Pending:
    """Messages that have been sent and not been answered.

    Args:
        grid: where they are sent.

    Attributes:
        waiting: message id -> the message, without its content.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.waiting: dict[str, Message] = {}
        self._answered: dict[str, Message] = {}

    def send(self, message: Message) -> Message | None:
        """Sends a message; returns an error in place of the reply where the SuperLink does not take it."""
        asked = Message(RecordDict(), message.metadata.dst_node_id, message.metadata.message_type)
        # Flower gives no identity to a message that it does not store: to a node that has gone, or too large.
        if message_id := next(iter(self._grid.push_messages([message])), ""):
            self.waiting[message_id] = asked
            return None
        if asked.metadata.dst_node_id not in self._grid.get_node_ids():
            return Message(Error(UNSENT, "the node has gone: the SuperLink does not know it any more"), reply_to=asked)
        size = sum(len(array.data) for record in message.content.array_records.values() for array in record.values())
        reason = f"the SuperLink did not take the message, with {size / 1e6:.3g} MB of tensors: its log says why"
        return Message(Error(UNSENT, reason), reply_to=asked)

    def collect(self) -> list[Message]:
        """The replies that have come since, each checked; an error in place of a reply that is not of the node asked."""
        found = []
        for reply in self._grid.pull_messages(self.waiting) if self.waiting else ():
            message_id = reply.metadata.reply_to_message_id or ""
            asked = self.waiting.get(message_id) or self._answered.get(message_id)
            if asked is not None:
                checked = _checked(reply, asked, message_id in self._answered)
                if checked is reply or reply.has_error():
                    self._answered[message_id] = self.waiting.pop(message_id, asked)
                found.append(checked)
        return found


def _checked(reply: Message, asked: Message, again: bool) -> Message:
    """The reply, or an error in its place. An error may be the server's own word about a node."""
    sender, node = reply.metadata.src_node_id, asked.metadata.dst_node_id
    if again:
        return Message(Error(FOREIGN, "it answered a second time"), reply_to=asked)
    if reply.has_error():
        return Message(reply.error, reply_to=asked)
    if sender != node:
        problem = f"node {sender} answered for it; its own node is {node}"
        return Message(Error(FOREIGN, problem), reply_to=asked)
    return reply


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


def words_of(error: Error) -> str:
    """The reason of an error, with its number where it is one of Flower's own; ours say in words what the matter is."""
    return str(error.reason) if error.code >= messages.REFUSED else f"{error.reason} (Flower's error {error.code})"


def content_of(reply: Message) -> RecordDict:
    """The content of a reply.

    Raises:
        MessageError: the reply is an error; its words are the sender's, see `plain.printable`.
    """
    if reply.has_error():
        raise MessageError(words_of(reply.error))
    return reply.content
