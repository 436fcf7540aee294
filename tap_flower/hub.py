"""The Hugging Face hub: whether it answers (asked once a process), and what presets need of it."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tap_flower.errors import BackboneError

PATIENCE = 3.0
"""Seconds that the hub has to answer."""
DEMO = "demo"
log = logging.getLogger("tap_flower")


def demo_folder() -> Path:
    """Folder of the packaged demo backbone."""
    return Path(str(files("tap_flower.assets"))) / "flava-demo"


def locate(backbone: str) -> str:
    """What `from_pretrained` takes: the packaged folder for `demo`, otherwise the local folder or hub id itself."""
    return str(demo_folder()) if backbone == DEMO else backbone


def check_folder(name: str) -> None:
    """Checks that a backbone's name which is a path, not one of the hub, leads somewhere.

    Raises:
        BackboneError: it does not.
    """
    if Path(name).is_absolute() and not Path(name).exists():
        raise BackboneError(f"there is no folder {name}: give the folder of a checkpoint, or a hub id, OWNER/NAME")


def prepare(name: str) -> None:
    """Called before a model or data set is loaded by its name.

    Without a network, the hub's libraries try again and again: 23 s for each name. Where the hub does not answer within
    `PATIENCE` seconds, they are switched to their offline mode, as `HF_HUB_OFFLINE=1` does: what was downloaded before is
    found, and the rest fails at once. A local folder asks nobody.

    Args:
        name: of a repository on the hub, or a local folder.
    """
    if not Path(name).exists() and not answers():
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True
        copied = sys.modules.get("datasets.config")  # where it is imported, it has its own copy of the setting
        if copied is not None:
            vars(copied).update(HF_HUB_OFFLINE=True, HF_DATASETS_OFFLINE=True)


@cache
def answers() -> bool:
    """Whether the hub answers. Any response counts, by way of the proxies and certificates that the hub's library uses."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    problems: list[Exception] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
        except Exception as error:  # whatever the library's HTTP client raises
            problems.append(error)

    # In a thread, since the look-up of the host's name knows no timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    if asking.is_alive() or problems:
        reason = problems[0] if problems else f"no answer within {PATIENCE:g} s"
        log.warning(
            "the hub cannot be reached (%s: %s): only what was downloaded before can be used",
            constants.ENDPOINT,
            reason,
        )
        return False
    return True


@dataclass(frozen=True)
class Facts:
    """Facts of a repository on the hub, as its own pages give them.

    Attributes:
        licence: as its card names it.
        megabytes: size of its files (for a checkpoint, of the weights); None where it is not known.
    """

    licence: str
    megabytes: int | None = None


CATALOGUE = {
    "facebook/flava-full": Facts("BSD-3-Clause", 1220),
    "dandelin/vilt-b32-mlm": Facts("Apache-2.0", 543),
    "zh-plus/tiny-imagenet": Facts("none stated", 161),
    "uoft-cs/cifar100": Facts("unknown"),
    "sh0416/ag_news": Facts("none stated", 36),
    "ilee0022/Caltech-256": Facts("none stated", 1148),
    "merve/vqav2-small": Facts("none stated", 3377),
    "cais/mmlu": Facts("MIT"),
    "allenai/common_gen": Facts("MIT"),
    "zalando-datasets/fashion_mnist": Facts("MIT"),
}


def fetch_command(name: str, revision: str | None, *, is_model: bool = False) -> str:
    """The command that fetches a data set or a checkpoint from the hub."""
    kind = "" if is_model else " --repo-type dataset"
    return f"hf download {name}{kind}" + (f" --revision {revision}" if revision else "")


# --- what is fetched by the operator's hand -------------------------------------------------------

_SAFE, _PICKLED = "model*.safetensors*", "pytorch_model*.bin*"
_BESIDE = ("*.json", "*.txt", "*.model")
"""Configuration, tokenizer and image processor."""


def is_here(name: str, revision: str | None, kind: str) -> bool:
    """Whether a repository was downloaded before; `kind` is `model` or `dataset`."""
    from huggingface_hub import snapshot_download

    try:
        return bool(snapshot_download(name, revision=revision, repo_type=kind, local_files_only=True))
    except (OSError, ValueError):
        return False


def fetch_data(name: str, revision: str | None = None) -> Path:
    """Downloads a data set into the hub's cache.

    Raises:
        BackboneError: the hub does not give it.
    """
    return _download(name, repo_type="dataset", revision=revision)


def fetch_model(name: str, revision: str | None = None, to: Path | None = None) -> Path:
    """Downloads a checkpoint; one that has `pytorch_model.bin` alone is converted to `model.safetensors`.

    Args:
        name: hub id; or a folder, which is converted alone.
        revision: commit, tag or branch of a hub id.
        to: folder for it; None is the hub's cache, or for a converted one a folder of its last name in this one.

    Returns:
        The folder that it is in.

    Raises:
        BackboneError: the hub does not give it, or its file holds other things than tensors.
    """
    if Path(name).is_dir():
        folder = Path(name) if to is None else to
        if folder != Path(name):
            shutil.copytree(name, folder, dirs_exist_ok=True)
        return _converted(folder)
    from huggingface_hub import HfApi

    try:
        there = HfApi().list_repo_files(name, revision=revision)
    except Exception as error:  # whatever the hub's library and its HTTP client raise
        raise _not_had(name, error) from error
    pickled = not any(fnmatch(file, _SAFE) for file in there)
    target = (to or Path(name.split("/")[-1])) if pickled else to
    weights = _PICKLED if pickled else _SAFE
    found = _download(name, revision=revision, local_dir=target, allow_patterns=[weights, *_BESIDE])
    return _converted(found) if pickled else found


def _download(name: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, **options))
    except Exception as error:  # whatever the hub's library and its HTTP client raise
        raise _not_had(name, error) from error


def _not_had(name: str, error: Exception) -> BackboneError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return BackboneError(f"{name} cannot be downloaded from the hub: {reason}")


def _converted(folder: Path) -> Path:
    """Writes `model.safetensors` beside `pytorch_model.bin`; nothing but tensors is made of the pickle."""
    import torch
    from safetensors.torch import save_file

    if any(fnmatch(path.name, _SAFE) for path in folder.iterdir()):
        return folder
    files = sorted(path for path in folder.iterdir() if fnmatch(path.name, _PICKLED) and path.suffix == ".bin")
    if not files:
        raise BackboneError(
            f"{folder} holds neither model.safetensors nor pytorch_model.bin: give the folder of a checkpoint"
        )
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
            # Two names may share memory here, which safetensors does not write.
            tensors |= {name: tensor.clone().contiguous() for name, tensor in found.items()}
        except Exception as error:  # UnpicklingError, and whatever a damaged file makes of it
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "weights_only" in reason:  # torch advises to run what is in the file
                reason = "get another one"
            raise BackboneError(f"{file} is damaged, or holds other things than tensors: {reason}") from error
    written = folder / ".model.safetensors.tmp"
    save_file(tensors, written, metadata={"format": "pt"})
    written.replace(folder / "model.safetensors")
    return folder
