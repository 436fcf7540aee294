"""Who takes part: waits for nodes, asks each for its manifest, admits clients."""

from __future__ import annotations

import time
from collections.abc import Callable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from tap_flower.errors import MessageError
from tap_flower.server.first_values import FirstValues
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
    grid: Grid,
    roster: Roster,
    ask: RecordDict,
    timeout: float,
    refuse: Callable[[str, str], None],
    first: FirstValues,
) -> list[str]:
    """Forgets the nodes that have gone, and admits those that are not known yet.

    Args:
        grid: a `StreamingGrid`.
        roster: changed in place.
        ask: content of the message that asks for a manifest.
        timeout: seconds that a node may take to answer.
        refuse: (node, problem) is told of each node that cannot take part.
        first: the run's first values; the first client by name that has a tensor is asked for its first value.

    Returns:
        A sentence for each of these nodes.
    """
    refused = []
    alive = set(grid.get_node_ids())
    roster.keep_only(alive)
    unknown = sorted(alive - set(roster.nodes.values()))
    replies = grid.send_and_receive((Message(ask, node, MANIFEST, group_id="0") for node in unknown), timeout=timeout)
    found: list[tuple[str, int, Manifest]] = []
    problems: list[tuple[int, str]] = []
    for reply in replies:
        node = reply.metadata.src_node_id
        try:
            if reply.has_error():
                raise MessageError(f"{reply.error.reason} (code {reply.error.code})")
            messages.refuse_tensors(reply.content)
            manifest = messages.decode(reply.content, Manifest, f"node {node}")
            found.append((manifest.client, node, manifest))
        except MessageError as error:
            problems.append((node, str(error)))
    # By name: whose first values count, and which of two clients of one name is refused, does not depend on the order of
    # arrival.
    for _, node, manifest in sorted(found, key=lambda one: (one[0], str(one[1]))):
        try:
            first.admit(grid, node, manifest)
        except MessageError as error:
            problems.append((node, str(error)))
    problems += first.hand_out(grid)
    for node, problem in sorted(problems, key=lambda one: str(one[0])):
        refuse(f"node {node}", problem)
        refused.append(f"node {node} cannot take part: {problem}")
    return refused
