"""Whether a client may take part: who it is, how much it brings, and whether its tasks are those of the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from tap_flower.config import Admission
from tap_flower.errors import MessageError
from tap_flower.wire.messages import Manifest


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
    if admission.fingerprint not in ("", manifest.fingerprint):
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
    if other.fingerprint != manifest.fingerprint:
        raise MessageError(
            f"client {name!r} has a backbone with fingerprint {manifest.fingerprint}, client {other.client!r} has "
            f"{other.fingerprint}: use the same checkpoint on every node"
        )
    for theirs in other.tasks:
        for task in manifest.tasks:
            if task.task != theirs.task:
                continue
            for what, mine, its in (
                ("kind", task.kind, theirs.kind),
                ("number of classes", task.head_size, theirs.head_size),
                ("hash of its classes", task.class_hash, theirs.class_hash),
            ):
                if mine and its and mine != its:
                    raise MessageError(
                        f"task {task.task!r} has the {what} {mine} on client {name!r} but {its} on {other.client!r}: list "
                        f"the same classes in the same order on both, or give the tasks two names"
                    )
