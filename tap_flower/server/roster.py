"""Who takes part: clients by their stable name, with what they hold."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor

from tap_flower.config import Admission
from tap_flower.core.initial import named_seed
from tap_flower.errors import MessageError
from tap_flower.server.admission import check_admission
from tap_flower.wire.messages import Manifest


class Roster:
    """The clients that the server knows, and one value for each tensor that any of them holds.

    Args:
        seed: seed of the run; it decides first values and sampling.
        tensors: values of a checkpoint, or nothing.
        admission: who may take part, and the bounds of the run; by default anyone within the default bounds.

    Attributes:
        tensors: tensor name -> the server's value (float32, CPU).
        manifests: client -> its manifest, also where the client has gone.
        nodes: client -> node, of the clients that are there.
        component_of: tensor name -> component.
    """

    def __init__(
        self, seed: int, tensors: Mapping[str, Tensor] | None = None, admission: Admission | None = None
    ) -> None:
        self.seed = seed
        self.admission = admission or Admission()
        self.tensors = dict(tensors or {})
        self.manifests: dict[str, Manifest] = {}
        self.nodes: dict[str, int] = {}
        self.component_of: dict[str, str] = {}
        self._first_holder: dict[str, str] = {}

    def admit(self, node: int, manifest: Manifest) -> None:
        """Takes in a client, or a known one that has come back on another node.

        Raises:
            MessageError: its name is taken by a node that is alive, or what it holds does not fit the others.
        """
        name = manifest.client
        if name in self.nodes and self.nodes[name] != node:
            raise MessageError(
                f"client {name!r} is already there on node {self.nodes[name]}: node {node} is refused; give every node "
                f"a client spec with a name of its own"
            )
        check_admission(manifest, self.manifests.values(), self.tensors, self.admission)
        before = self.manifests.get(name)
        if before is not None and before.tensors.keys() != manifest.tensors.keys():
            raise MessageError(
                f"client {name!r} has come back with the tasks {sorted(manifest.reach)}, and had {sorted(before.reach)} "
                f"before: give it its client spec again, or another name"
            )
        for tensor, info in manifest.tensors.items():
            known = self.tensors.get(tensor)
            if known is not None and tuple(known.shape) != info.shape:
                holder = self._first_holder.get(tensor, "the checkpoint")
                raise MessageError(
                    f"tensor {tensor!r} has shape {info.shape} on client {name!r} but {tuple(known.shape)} on "
                    f"{holder!r}: what has one name needs one shape, the same classes, backbone or layer on both: rename one"
                )
            if self.component_of.get(tensor, info.component) != info.component:
                raise MessageError(
                    f"tensor {tensor!r} belongs to {info.component!r} on client {name!r} but to "
                    f"{self.component_of[tensor]!r} on {self._first_holder[tensor]!r}: install one version everywhere"
                )
        self.tensors |= manifest.first_values(manifest.tensors.keys() - self.tensors.keys(), self.seed)
        self.recall(manifest)
        self.nodes[name] = node

    def recall(self, manifest: Manifest) -> None:
        """Takes in a client that the run has known before, whether or not it is there."""
        for tensor, info in manifest.tensors.items():
            self.component_of[tensor] = info.component
            self._first_holder.setdefault(tensor, manifest.client)
        self.manifests[manifest.client] = manifest

    def keep_only(self, alive: set[int]) -> None:
        """Forgets the nodes (not the tensors) of clients that have gone: their names may come back on other nodes."""
        for name in [name for name, node in self.nodes.items() if node not in alive]:
            del self.nodes[name]

    def leave(self, name: str) -> None:
        """Forgets the node of a client."""
        self.nodes.pop(name, None)

    @property
    def names(self) -> list[str]:
        """Clients that are there, sorted."""
        return sorted(self.nodes)

    def sample(self, server_round: int, count: int) -> list[str]:
        """The clients of a round, at most `count`: they depend on the seed, the round and the names, not on node ids."""
        names = self.names
        chosen = random.Random(named_seed(self.seed, "sample", server_round)).sample(names, min(count, len(names)))
        return sorted(chosen)

    def name_of(self, node: int) -> str:
        """The client on a node that is there."""
        return next(name for name, its_node in self.nodes.items() if its_node == node)

    def holders(self, names: Iterable[str]) -> dict[str, int]:
        """Component -> how many of some clients hold it, for those that any of them holds."""
        return dict(sorted(Counter(c for n in names for c in set(self.manifests[n].component_of.values())).items()))
