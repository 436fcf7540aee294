"""Who takes part: waits for nodes, asks each for its manifest, admits clients."""

from __future__ import annotations

import time
from collections.abc import Callable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from tap_flower.errors import MessageError
from tap_flower.plain import printable
from tap_flower.server.roster import Roster
from tap_flower.wire import messages
from tap_flower.wire.messages import MANIFEST, Manifest

_WAIT = 0.5
"""Seconds between looks for nodes that have not registered yet."""


def wait_for_nodes(grid: Grid, count: int, timeout: float) -> None:
    """Waits until so many nodes are there, at most `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while len(list(grid.get_node_ids())) < count and time.monotonic() < deadline:
        time.sleep(_WAIT)


def welcome(
    grid: Grid, roster: Roster, ask: RecordDict, timeout: float, refuse: Callable[[str, str], None]
) -> list[str]:
    """Forgets the nodes that have gone, and admits those that are not known yet.

    Args:
        grid: a `StreamingGrid`.
        roster: changed in place.
        ask: content of the message that asks for a manifest.
        timeout: seconds that a node may take to answer.
        refuse: (node, problem) is told of each node that cannot take part.

    Returns:
        A sentence for each problem, with the nodes that have it.
    """
    refused: dict[str, list[int]] = {}
    alive = set(grid.get_node_ids())
    roster.keep_only(alive)
    unknown = sorted(alive - set(roster.nodes.values()))
    replies = grid.send_and_receive((Message(ask, node, MANIFEST, group_id="0") for node in unknown), timeout=timeout)
    # In the order of nodes: which of two clients of one name is refused does not depend on the order of arrival.
    for reply in sorted(replies, key=lambda reply: str(reply.metadata.src_node_id)):
        node = reply.metadata.src_node_id
        try:
            content = messages.content_of(reply)
            messages.refuse_tensors(content)
            roster.admit(node, messages.decode(content, Manifest, f"node {node}"))
        except MessageError as error:
            problem = printable(str(error))
            refuse(f"node {node}", problem)
            refused.setdefault(problem, []).append(node)
    return [
        f"node {nodes[0]}{f' and {len(nodes) - 1} more' if nodes[1:] else ''} cannot take part: {problem}"
        for problem, nodes in refused.items()
    ]
