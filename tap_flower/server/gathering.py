"""Who takes part: asks nodes for their manifests, beside whatever else the run does, and admits their clients."""

from __future__ import annotations

import time
from collections.abc import Callable

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode

from tap_flower.errors import MessageError
from tap_flower.server.grid import UNSENT, Pending, StreamingGrid
from tap_flower.server.roster import Roster
from tap_flower.wire import messages
from tap_flower.wire.messages import MANIFEST, Manifest

_LOOK, _LONGEST_LOOK = 0.1, 0.5
"""Seconds between looks for nodes and manifests, while a run waits for them: half as long again after each look."""
_NOT_THE_NODES_WORD = {
    ErrorCode.UNKNOWN,
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
    UNSENT,
}
"""Codes of errors after which a node is asked again in time: it was busy, away, or has died and been started again."""


class Gathering:
    """Asks the nodes that are not known for their manifests. It never waits for one node while others work.

    A node that was refused, or that does not answer, is left alone until it has gone and come back; a question that expires
    is asked again.

    Args:
        grid: where the nodes are.
        roster: the clients; those whose nodes have gone are taken from it.
        ask: makes the content of the question.
        admit: called with (node, manifest); raises a MessageError where the client cannot take part.
        refuse: told (node, problem) of each node that cannot take part.
        timeout: seconds for which a question stays valid.

    Attributes:
        refused: node -> why it cannot take part, of the nodes that are there.
        alive: the nodes that were there at the last look.
    """

    def __init__(
        self,
        grid: StreamingGrid,
        roster: Roster,
        ask: Callable[[], RecordDict],
        admit: Callable[[int, Manifest], None],
        refuse: Callable[[int, str], None],
        timeout: float,
    ) -> None:
        self._grid, self._roster, self._ask, self._admit, self._refuse = grid, roster, ask, admit, refuse
        self._timeout = timeout
        self._pending = Pending(grid)
        self._expires: dict[int, float] = {}
        self.refused: dict[int, str] = {}
        self.alive: set[int] = set()

    def look(self) -> None:
        """Forgets the nodes that have gone, admits the clients that have answered, asks the new nodes. Returns at once."""
        self.alive = set(self._grid.get_node_ids())
        self._roster.keep_only(self.alive)
        now = time.monotonic()
        for unheard in (self.refused, self._expires):
            for node in unheard.keys() - self.alive:
                del unheard[node]
        asked = {node for node, expires in self._expires.items() if expires > now}
        for node in sorted(self.alive - set(self._roster.nodes.values()) - self.refused.keys() - asked):
            question = Message(self._ask(), node, MANIFEST, group_id="0", ttl=self._timeout)
            self._expires[node] = now + self._timeout
            if (error := self._pending.send(question)) is not None:
                self._take(error)
        # In the order of nodes: which of two clients of one name is refused does not depend on the order of arrival.
        for reply in sorted(self._pending.collect(), key=lambda reply: reply.metadata.src_node_id):
            self._take(reply)

    def wait(self, complete: Callable[[], bool], count: int, timeout: float) -> None:
        """Looks until all is complete, at most `timeout` seconds; it ends early where no answer is to come any more.

        Args:
            complete: whether everybody is there.
            count: nodes that are expected.
            timeout: seconds.
        """
        deadline, pause = time.monotonic() + timeout, _LOOK
        self.look()
        while not complete() and time.monotonic() < deadline:
            if len(self.alive) >= count and self.alive <= set(self._roster.nodes.values()) | self.refused.keys():
                return
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_LOOK)
            self.look()

    def _take(self, reply: Message) -> None:
        node = reply.metadata.src_node_id
        if reply.has_error() and reply.error.code in _NOT_THE_NODES_WORD:
            self._refuse(node, f"{reply.error.reason} (code {reply.error.code})")
            return
        self._expires.pop(node, None)
        try:
            if reply.has_error():
                raise MessageError(f"{reply.error.reason} (code {reply.error.code})")
            messages.refuse_tensors(reply.content)
            self._admit(node, messages.decode(reply.content, Manifest, f"node {node}"))
        except MessageError as error:
            self.refused[node] = str(error)
            self._refuse(node, str(error))
