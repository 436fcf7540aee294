"""Who takes part: clients by their stable name, with what they hold."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from tap_flower.config import Admission
from tap_flower.core.seeds import named_seed
from tap_flower.errors import MessageError
from tap_flower.plain import same_backbone
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
        first: tensor name -> first value (float32), of those that do not come from the seed.
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
        self.first: dict[str, Tensor] = {}
        self._first_holder: dict[str, str] = {}

    def first_values(self, manifest: Manifest, names: Iterable[str]) -> dict[str, Tensor]:
        """The run's first values (float32, CPU) of some tensors of a client."""
        found = {}
        for name in names:
            info = manifest.tensors[name]
            found[name] = (
                self.first[name]
                if info.initial is None or name in self.first
                else info.initial.value(name, info.shape, self.seed)
            )
        return found

    def admit(
        self, node: int, manifest: Manifest, ask: Callable[[list[str]], dict[str, Tensor]] = lambda _: {}
    ) -> None:
        """Takes in a client, or a known one that has come back on another node.

        Args:
            node: its node.
            manifest: what it has.
            ask: names of tensors -> their first values (float32), which nobody but this client knows.

        Raises:
            MessageError: its name is taken by a node that is alive, or what it holds does not fit the others.
        """
        name = manifest.client
        if name in self.nodes and self.nodes[name] != node:
            raise MessageError(
                f"client {name!r} is already there on node {self.nodes[name]}: node {node} is refused; give every client "
                f"a name of its own"
            )
        check_admission(manifest, self.manifests.values(), self.tensors, self.admission)
        before = self.manifests.get(name)
        if before is not None and (changed := sorted(before.tensors.keys() ^ manifest.tensors.keys())):
            if before.reach.keys() == manifest.reach.keys():
                how = "is gone" if changed[0] in before.tensors else "is new"
                raise MessageError(
                    f"client {name!r} now has other tensors than before ({changed[0]!r} {how}): use the module it began "
                    f"with, or another name"
                )
            raise MessageError(
                f"client {name!r} has come back with the tasks {sorted(manifest.reach)}, and had {sorted(before.reach)} "
                f"before: give it its client spec again, or another name"
            )
        for tensor, info in manifest.tensors.items():
            known = self.tensors.get(tensor)
            if known is not None and tuple(known.shape) != info.shape:
                holder = self._first_holder.get(tensor, "the checkpoint")
                if holder == name:
                    raise MessageError(
                        f"client {name!r}: the module has changed since the run began: {tensor!r} has shape {info.shape}, "
                        f"and had {tuple(known.shape)}: go on with the module of then, or begin a new run"
                    )
                raise MessageError(
                    f"tensor {tensor!r} has shape {info.shape} on client {name!r} but {tuple(known.shape)} on "
                    f"{holder!r}: what has one name needs one shape, the same classes, backbone or layer on both: rename one"
                )
            if self.component_of.get(tensor, info.component) != info.component:
                raise MessageError(
                    f"tensor {tensor!r} belongs to {info.component!r} on client {name!r} but to "
                    f"{self.component_of[tensor]!r} on {self._first_holder[tensor]!r}: give both clients the same "
                    f"`components`, and install one version everywhere"
                )
        if unknown := [n for n, info in manifest.tensors.items() if info.initial is None and n not in self.first]:
            self.first |= ask(unknown)
        new = [tensor for tensor in manifest.tensors if tensor not in self.tensors]
        self.tensors |= self.first_values(manifest, new)
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

    def held(self) -> Iterator[tuple[str, str, str]]:
        """(client, task, kind of task) of every client that is there."""
        for name in self.names:
            for task in self.manifests[name].tasks:
                yield name, task.task, task.kind

    def sample(self, server_round: int, count: int) -> list[str]:
        """The clients of a round, at most `count`: they depend on the seed, the round and the names, not on node ids."""
        names = self.names
        chosen = random.Random(named_seed(self.seed, "sample", server_round)).sample(names, min(count, len(names)))
        return sorted(chosen)

    def holders(self, names: Iterable[str]) -> dict[str, int]:
        """Component -> how many of some clients hold it, for those that any of them holds."""
        return dict(sorted(Counter(c for n in names for c in set(self.manifests[n].component_of.values())).items()))


def check_admission(
    manifest: Manifest, known: Iterable[Manifest], tensors: Mapping[str, Tensor], admission: Admission
) -> None:
    """Checks a manifest before anything is allocated for it.

    Args:
        manifest: of the client.
        known: the manifests of all clients of the run, an earlier one of this client and those of clients that have gone
            among them.
        tensors: the server's values.
        admission: who may take part, and the bounds of the run.

    Raises:
        MessageError: the client may not take part; the message names what is wrong.
    """
    name, others = manifest.client, [other for other in known if other.client != manifest.client]
    if admission.clients and name not in admission.clients:
        raise MessageError(
            f"client {name!r} is not one of the {len(admission.clients)} in admission.clients: add it there, or correct "
            f"the name in its client spec"
        )
    if admission.fingerprint and not same_backbone(admission.fingerprint, manifest.fingerprint):
        raise MessageError(
            f"client {name!r} has a backbone with fingerprint {manifest.fingerprint}, not admission.fingerprint = "
            f"{admission.fingerprint}: use that checkpoint on every node"
        )
    new = [info for tensor, info in manifest.tensors.items() if tensor not in tensors]
    values = sum(tensor.numel() for tensor in tensors.values()) + sum(math.prod(info.shape) for info in new)
    for what, found, most in (
        ("clients", len(others) + 1, admission.most_clients),
        ("tensors", len(tensors) + len(new), admission.most_tensors),
        ("gigabytes", 4e-9 * values, admission.most_gigabytes),
    ):
        if found > most:
            raise MessageError(
                f"with client {name!r} the run would have {found:.6g} {what}, more than admission.most_{what} = {most:g}: "
                f"raise it, or look at who takes part"
            )
    for other in others:
        _check_agreement(manifest, other)


def _check_agreement(manifest: Manifest, other: Manifest) -> None:
    """Refuses a client that means something else by a name that another client has, too."""
    name = manifest.client
    if not same_backbone(other.fingerprint, manifest.fingerprint):
        raise MessageError(
            f"client {name!r} has a backbone with fingerprint {manifest.fingerprint}, client {other.client!r} has "
            f"{other.fingerprint} (weights-tokenizer): use the same checkpoint on every node"
        )
    for theirs in other.tasks:
        for task in manifest.tasks:
            if task.task != theirs.task:
                continue
            classes = "list the same classes in the same order on both"
            for what, mine, its, remedy in (
                ("kind", task.kind, theirs.kind, "use one kind"),
                ("number of classes", task.head_size, theirs.head_size, classes),
                ("headline", str(task.judged_by), str(theirs.judged_by), "judge both by one metric"),
            ):
                if mine and its and mine != its:
                    raise MessageError(
                        f"task {task.task!r} has the {what} {mine} on client {name!r} but {its} on {other.client!r}: "
                        f"{remedy}, or give the tasks two names"
                    )
            if task.class_hash and theirs.class_hash and task.class_hash != theirs.class_hash:
                raise MessageError(
                    f"task {task.task!r} has other classes on client {name!r} than on {other.client!r}, or in another "
                    f"order: {classes}, or give the tasks two names"
                )
