"""Who takes part: clients by their stable name, with what they hold."""

from __future__ import annotations

import random
from collections.abc import Mapping

from torch import Tensor

from tap_flower.core.averaging import BadUpdateError
from tap_flower.core.initial import named_seed
from tap_flower.wire.manifest import Manifest


class RosterError(RuntimeError):
    """A client cannot take part; the message names it and what to do."""


class Roster:
    """The clients that the server knows, and one value for each tensor that any of them holds.

    Args:
        seed: of the run; it decides initial values and sampling.
        tensors: values of a checkpoint, or nothing.
        best: likewise, those of the best round so far.
        holds: likewise, see the attribute.
        changed: likewise.

    Attributes:
        best: values of the best round, where the run may stop early.
        holds: client -> the number of complete rounds as of which it holds all of its tensors, as far as the server knows.
        changed: component -> the round in which it got its values; the initial ones are of round 0.
    """

    def __init__(
        self,
        seed: int,
        tensors: Mapping[str, Tensor] | None = None,
        best: Mapping[str, Tensor] | None = None,
        holds: Mapping[str, int] | None = None,
        changed: Mapping[str, int] | None = None,
    ) -> None:
        self.seed = seed
        self.tensors = dict(tensors or {})
        self.best = dict(best or {})
        self.holds = dict(holds or {})
        self.changed = dict(changed or {})
        self.manifests: dict[str, Manifest] = {}
        self.nodes: dict[str, int] = {}
        self.component_of: dict[str, str] = {}
        self._first_holder: dict[str, str] = {}

    def admit(self, node: int, manifest: Manifest) -> None:
        """Takes in a client, or a known one that has come back on another node.

        Raises:
            RosterError: its name is taken by a node that is alive, or what it holds does not fit the others.
        """
        name = manifest.client
        if name in self.nodes and self.nodes[name] != node:
            raise RosterError(
                f"client {name!r} is already there on node {self.nodes[name]}: node {node} is refused; give every node "
                f"a client spec with a name of its own"
            )
        before = self.manifests.get(name)
        if before is not None and before.tensors.keys() != manifest.tensors.keys():
            raise RosterError(
                f"client {name!r} has come back with the tasks {sorted(manifest.reach)}, and had {sorted(before.reach)} "
                f"before: give it its client spec again, or another name"
            )
        for other in self.manifests.values():
            if other.client != name and other.fingerprint != manifest.fingerprint:
                raise RosterError(
                    f"client {name!r} has a backbone with fingerprint {manifest.fingerprint}, client {other.client!r} "
                    f"has {other.fingerprint}: use the same checkpoint on every node"
                )
        for tensor, info in manifest.tensors.items():
            known = self.tensors.get(tensor)
            if known is not None and tuple(known.shape) != info.shape:
                holder = self._first_holder.get(tensor, "the checkpoint")
                raise RosterError(
                    f"tensor {tensor!r} has shape {info.shape} on client {name!r} but {tuple(known.shape)} on "
                    f"{holder!r}: what has one name needs one shape, the same classes, backbone or layer on both: rename one"
                )
            if self.component_of.get(tensor, info.component) != info.component:
                raise RosterError(
                    f"tensor {tensor!r} belongs to {info.component!r} on client {name!r} but to "
                    f"{self.component_of[tensor]!r} on {self._first_holder[tensor]!r}: install one version everywhere"
                )
        self.tensors |= manifest.initial_values(manifest.tensors.keys() - self.tensors.keys(), self.seed)
        for tensor, info in manifest.tensors.items():
            self.component_of[tensor] = info.component
            self._first_holder.setdefault(tensor, name)
        self.manifests[name] = manifest
        self.nodes[name] = node

    def keep_only(self, alive: set[int]) -> None:
        """Forgets the nodes (not the tensors) of clients that have gone: their names may come back on other nodes."""
        for name in [name for name, node in self.nodes.items() if node not in alive]:
            del self.nodes[name]

    @property
    def names(self) -> list[str]:
        """Clients that are there, sorted."""
        return sorted(self.nodes)

    def sample(self, server_round: int, count: int) -> list[str]:
        """The clients of a round: it depends on the seed, the round and the names, not on node ids."""
        names = self.names
        chosen = random.Random(named_seed(self.seed, "sample", server_round)).sample(names, min(count, len(names)))
        return sorted(chosen)

    def update(self, tensors: Mapping[str, Tensor], changed: set[str], server_round: int) -> None:
        """Takes the values after a round, in which the components `changed` got new ones."""
        self.tensors = dict(tensors)
        self.changed |= dict.fromkeys(changed, server_round)

    def go_back(self) -> None:
        """Takes the values of the best round again; what clients hold of later ones is void."""
        self.tensors |= self.best
        self.holds.clear()

    def tensors_for(self, name: str) -> tuple[dict[str, Tensor], int | None]:
        """The current values of a client's tensors, without those that it holds already.

        Returns:
            The tensors, and the number of complete rounds as of which the client holds the others; None where there are
            no others.
        """
        held, component_of = self.holds.get(name), self.manifests[name].component_of
        if held is not None:
            component_of = {t: c for t, c in component_of.items() if self.changed.get(c, 0) > held}
        complete = len(component_of) == len(self.manifests[name].tensors)
        return {tensor: self.tensors[tensor] for tensor in component_of}, None if complete else held

    def expected_examples(self, names: list[str]) -> dict[str, int]:
        """Component -> sum of the examples of some clients."""
        total = dict.fromkeys(self.component_of.values(), 0)
        for name in names:
            for component, examples in self.manifests[name].examples_per_component.items():
                total[component] += examples
        return total

    def check_examples(self, name: str, examples: Mapping[str, int]) -> None:
        """Refuses a reply whose example counts are not those of the client's manifest.

        Raises:
            BadUpdateError: with both counts.
        """
        expected = {task.pair.task: task.examples for task in self.manifests[name].tasks}
        if dict(examples) != expected:
            raise BadUpdateError(
                f"client {name!r}: the reply counts {dict(examples)} examples, the manifest {expected}"
            )
