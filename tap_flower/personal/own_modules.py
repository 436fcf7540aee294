"""Puts what was trained into a module of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from tap_flower.client.state import FIRST, PERSONAL, SERVER
from tap_flower.core.module_tensors import Names
from tap_flower.errors import PersonalError, StorageError
from tap_flower.files import default_state_dir, read_tensors
from tap_flower.plain import did_you_mean

_M = TypeVar("_M", bound=nn.Module)


def load_personal(
    module: _M,
    client: str,
    run: str | Path | None = None,
    which: str | None = None,
    state_dir: str | Path | None = None,
) -> _M:
    """A client's module with the tensors of its personal model, in evaluation mode; returns the module itself.

    Args:
        module: as the client's `model` builds it; changed in place.
        client: name of the client.
        run: identity of a run, or the client's folder in it; None takes the newest run that the client took part in.
        which: `tap`, `personal`, or another model that the run's method keeps; None takes what the method's stage 2 has
            made, or before stage 2 the personal model.
        state_dir: the node's `state-dir`; None takes `tap-flower` in Flower's home.

    Raises:
        StorageError: the client has no such run there, or a file is damaged.
        PersonalError: the run has no such model, or its tensors are not those of the module; or the folder is another
            client's.
    """
    parent = Path(state_dir or default_state_dir()) / client
    runs = {path.parent.name: path.stat().st_mtime for path in parent.glob(f"*/{PERSONAL}")}
    name = max(runs, key=lambda name: runs[name], default=None) if run is None else str(run)
    folder = parent / name if name in runs else None
    if folder is None and run is not None and Path(run).is_dir():
        folder = Path(run).resolve()
        if folder.parent.name != client:
            raise PersonalError(
                f"{folder} is a folder of client {folder.parent.name!r}, not of {client!r}: name that client, or give the "
                f"folder to `load_module`"
            )
    if folder is None:
        wanted = "no run" if run is None else f"no run {str(run)!r}"
        there = f"; it has {', '.join(sorted(runs))}" if runs else did_you_mean(client, _clients(parent.parent))
        raise StorageError(f"client {client!r} has {wanted} in {parent}{there}: give the node's state-dir")
    return load_module(module, folder, which or _result(folder))


def load_module(module: _M, folder: str | Path, which: str = "tap") -> _M:
    """A client's own module with the tensors of one of its models, in evaluation mode; returns the module itself.

    Args:
        module: as the client's `model` builds it; changed in place.
        folder: of the client in a run: STATE_DIR/NAME/RUN.
        which: `tap`, `personal`, or another model that the run's method keeps.

    Raises:
        StorageError: the folder has no such model, or it is damaged.
        PersonalError: its tensors are not those of the module.
    """
    folder = Path(folder)
    if not (folder / f"{which}.safetensors").exists():
        raise PersonalError(f"{folder} has no model {which!r}: it has {', '.join(_models(folder)) or 'none'}")
    tensors, _ = read_tensors(folder / f"{which}.safetensors")
    state = {name: value for name, value in tensors.items() if ":" not in name}  # the others belong to other models
    first = read_tensors(folder / FIRST)[0] if (folder / FIRST).exists() else {}
    names = Names(module)
    own = names.all_tensors(module)
    needed = {name for name, parameter in names.parameters(module) if parameter.requires_grad}
    for name in sorted((needed - state.keys()) | (state.keys() - own.keys())):
        where, lacks = ("the module", "the model") if name in needed else ("the model", "the module")
        raise PersonalError(
            f"{where} has the tensor {name!r}, which {lacks} lacks: give a module as the client builds it"
        )
    values = {**{name: value for name, value in first.items() if name in own and name not in needed}, **state}
    for name, value in values.items():
        if own[name].shape != value.shape:
            raise PersonalError(
                f"tensor {name!r} has shape {tuple(own[name].shape)} in the module and {tuple(value.shape)} in the model: "
                f"give a module as the client builds it"
            )
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    return module.eval()


def _clients(state_dir: Path) -> list[str]:
    """Names of the clients that have state there."""
    return sorted({path.parent.parent.name for path in state_dir.glob(f"*/*/{PERSONAL}")})


def _models(folder: Path) -> list[str]:
    """Names of the models in a client's folder, oldest first."""
    files = [path for path in folder.glob("*.safetensors") if path.name not in (FIRST, SERVER)]
    found = sorted(files, key=lambda path: path.stat().st_mtime)
    return [path.stem for path in found if "." not in path.stem]


def _result(folder: Path) -> str:
    """What stage 2 has written last, else the personal model."""
    made = [name for name in _models(folder) if name != Path(PERSONAL).stem]
    return "tap" if "tap" in made else made[-1] if made else Path(PERSONAL).stem
