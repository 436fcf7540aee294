"""The run's first values: what `initial_arrays` names, else what the first client by name has built its module with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from tap_flower.config import Encoding
from tap_flower.core.averaging import check_form
from tap_flower.core.module_tensors import as_float32, digest
from tap_flower.errors import MessageError, RunError, StorageError
from tap_flower.files import read_tensors, write_tensors
from tap_flower.server.grid import content_of, words_of
from tap_flower.server.roster import Roster
from tap_flower.wire import messages
from tap_flower.wire.messages import VALUES, Manifest
from tap_flower.wire.tensors import encode_tensors

FIRST = "first.safetensors"
_EXACT = Encoding.float32
SCHEMA = 2
Query = Callable[[Sequence[str], ArrayRecord | None], RecordDict]
"""(tensors whose first values are wanted, first values that are sent) -> content of a query."""
log = logging.getLogger("tap_flower")


class FirstValues:
    """Sees to it that all clients of a run start from the same values, whatever their modules were built with.

    A manifest says by a digest what each tensor was built with. Values travel only where digests differ: trainable ones once
    to the server, and once to each client that has built others; frozen ones and buffers in the same way.

    Args:
        roster: clients of the run; `roster.first` has the values.
        initial_arrays: as in `TapStrategy.start`; tensors that a resumed run knows already keep their values.
        folder: folder of the server in the run folder.
        resume: whether the first values there are those of the run.
        timeout: seconds that a client may take to answer.
        query: makes the content of a query.

    Attributes:
        sent: `down` and `up` -> bytes of the first values that have travelled.
    """

    def __init__(
        self, roster: Roster, initial_arrays: ArrayRecord, folder: Path, resume: bool, timeout: float, query: Query
    ) -> None:
        self._roster, self._arrays, self._file, self._timeout = roster, initial_arrays, folder / FIRST, timeout
        self._query, self.sent = query, {"down": 0, "up": 0}
        self._digests: dict[str, str] = {}
        self._given: set[str] = set()
        self._settled: set[str] = set()
        if resume and self._file.exists():
            roster.first, record = read_tensors(self._file)
            if record.get("schema") != SCHEMA:
                raise StorageError(f"{self._file} was written by another version of tap-flower: use that version")
            self._digests, self._given, self.sent = dict(record["digests"]), set(record["given"]), record["sent"]

    def given(self) -> dict[str, Tensor]:
        """What `initial_arrays` has given to the run: tensor name -> first value (float32)."""
        return {name: self._roster.first[name] for name in self._given}

    def admit(self, grid: Grid, node: int, manifest: Manifest) -> None:
        """Admits a client, and asks it for the first values that nobody else has.

        Args:
            grid: a `StreamingGrid`.
            node: node of the client.
            manifest: of the client.

        Raises:
            MessageError: the client does not fit the others or `initial_arrays`, or its values cannot be had.
        """
        shapes = {name: info.shape for name, info in manifest.tensors.items()}
        named = {*shapes, *manifest.built} & self._arrays.keys() - self._known()
        new = {name: _given(manifest.client, name, self._arrays[name], shapes.get(name)) for name in sorted(named)}
        before = dict(self._roster.first)
        self._roster.first |= new
        try:
            self._roster.admit(node, manifest, partial(self._ask, grid, node, manifest))
        except MessageError:
            self._roster.first = before
            raise
        self._given |= new.keys()
        self._digests |= {name: digest(value) for name, value in new.items()}
        for name, found in manifest.built.items():
            self._digests.setdefault(name, found)
        self._settled.discard(manifest.client)

    def hand_out(self, grid: Grid) -> list[tuple[int, str]]:
        """Sends to each new client the first values of the run that its own module was not built with.

        Returns:
            (node, problem) of those that cannot take them, which are not admitted.
        """
        roster, lacking = self._roster, dict[str, list[str]]()
        problems: dict[str, str] = {}
        for name in sorted(roster.nodes.keys() - self._settled):
            manifest = roster.manifests[name]
            # A client whose values come from the seed has no digests: it lacks what `initial_arrays` gives.
            names = {n for n, found in manifest.built.items() if self._digests[n] != found}
            lacking[name] = sorted(names | self._given & manifest.tensors.keys() - manifest.built.keys())
            try:
                self._fetch(grid, name, lacking[name])
            except MessageError as error:
                problems[name] = str(error)
        asked = {name: names for name, names in lacking.items() if names and name not in problems}
        nodes = {roster.nodes[name]: name for name in asked}
        sent = (
            Message(
                self._counted("down", self._query((), encode_tensors({n: roster.first[n] for n in names}, _EXACT))),
                roster.nodes[name],
                VALUES,
                group_id="0",
            )
            for name, names in asked.items()
        )
        for reply in grid.send_and_receive(sent, timeout=self._timeout) if asked else ():
            if reply.has_error():
                problems[nodes[reply.metadata.src_node_id]] = words_of(reply.error)
        self._settled |= lacking.keys() - problems.keys()
        if lacking and self._digests:
            record = {"schema": SCHEMA, "digests": self._digests, "given": sorted(self._given), "sent": self.sent}
            write_tensors(self._file, roster.first, record)
        return [(roster.nodes.pop(name), problem) for name, problem in sorted(problems.items())]

    def check_names(self) -> None:
        """Refuses `initial_arrays` of which no client has any tensor, and tells of those of which none has this one.

        Raises:
            RunError: no client has any of them.
        """
        known = self._known()
        if self._arrays and not self._arrays.keys() & known:
            raise RunError(
                f"none of the names in initial_arrays is a tensor of any client: it has {min(self._arrays)!r}, the clients "
                f"have {min(known, default='none')!r}: give the names of their model, as its `state_dict` has them"
            )
        digests = {self._digests[name] for name in self._given}  # by another name, where weights are tied
        others = {n: as_float32(torch.from_numpy(self._arrays[n].numpy())) for n in self._arrays.keys() - known}
        if left := sorted(name for name, value in others.items() if value is None or digest(value) not in digests):
            log.warning(
                "initial_arrays names %d tensors that no client has, such as %r: they stay in `arrays` as they are; the "
                "clients have %r and others",
                *(len(left), left[0], min(known)),
            )

    def _known(self) -> set[str]:
        """The tensors whose first values the run has decided on."""
        return {*self._digests, *self._roster.tensors}

    def _holder(self, name: str) -> str:
        """The first client by name that is there and whose module was built with the run's first value; empty for none."""
        manifests, digest_ = self._roster.manifests, self._digests[name]
        return next((client for client in self._roster.names if manifests[client].built.get(name) == digest_), "")

    def _fetch(self, grid: Grid, client: str, names: list[str]) -> None:
        """Gets the values of tensors that are not trained from a client that has them, and tells of the difference."""
        holders = {name: self._holder(name) for name in names if name not in self._roster.first}
        for holder in sorted(set(holders.values())):
            theirs = [name for name, its in holders.items() if its == holder]
            if not holder:
                raise MessageError(
                    f"client {client!r} has built {theirs[0]!r} with another value than the run's, which no client that is "
                    f"there has: start a client that has it, or give {client!r} the module that it began with"
                )
            log.warning(
                "client %r has built %d frozen tensors or buffers, such as %r, with other values than %r: those of %r hold",
                *(client, len(theirs), theirs[0], holder, holder),
            )
            node, manifest = self._roster.nodes[holder], self._roster.manifests[holder]
            self._roster.first |= self._ask(grid, node, manifest, theirs)

    def _ask(self, grid: Grid, node: int, manifest: Manifest, names: list[str]) -> dict[str, Tensor]:
        question = Message(self._query(names, None), node, VALUES, group_id="0")
        found: dict[str, Tensor] = {}
        for reply in grid.send_and_receive([question], timeout=self._timeout):
            found = messages.tensors_of(self._counted("up", content_of(reply)), _EXACT)
        who = f"client {manifest.client!r}: its first values"
        shapes = {n: torch.empty(info.shape, device="meta") for n, info in manifest.tensors.items()}
        check_form(who, found, names, {**found, **shapes})
        if changed := [name for name in names if digest(found[name]) != manifest.built[name]]:
            raise MessageError(f"{who}: {changed[0]!r} is not what the manifest says")
        return found

    def _counted(self, way: str, content: RecordDict) -> RecordDict:
        self.sent[way] += sum(messages.payload_bytes(content).values())
        return content


def _given(client: str, name: str, array: Array, shape: tuple[int, ...] | None) -> Tensor:
    """A first value from `initial_arrays`, checked for a client."""
    tensor = torch.from_numpy(array.numpy())
    value = as_float32(tensor)
    if value is None:
        raise MessageError(
            f"initial_arrays: {name!r} is {tensor.dtype}, or holds a value that is not finite or that float32 cannot hold: "
            f"give finite torch.float32 values, such as those of `model.float().state_dict()`"
        )
    if shape is not None and tuple(value.shape) != shape:
        raise MessageError(
            f"initial_arrays: {name!r} has shape {tuple(value.shape)}, the tensor of client {client!r} {shape}: give the "
            f"values of the clients' own model"
        )
    return value
