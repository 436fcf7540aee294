"""The Hugging Face hub: whether it answers (asked once a process), and what presets need of it."""

from __future__ import annotations

import logging
import sys
import threading
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

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


def prepare(name: str) -> None:
    """Called before a model or data set is loaded by its name.

    Without a network, the hub's libraries try again and again: 23 s for each name. Where the hub does not answer within
    `PATIENCE` seconds, they are switched to their offline mode, as `HF_HUB_OFFLINE=1` does: what was downloaded before is
    found, and the rest fails at once. A local folder asks nobody.

    Args:
        name: of a repository on the hub, or a local folder.
    """
    if not Path(name).exists() and not _answers():
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True
        copied = sys.modules.get("datasets.config")  # where it is imported, it has its own copy of the setting
        if copied is not None:
            vars(copied).update(HF_HUB_OFFLINE=True, HF_DATASETS_OFFLINE=True)


@cache
def _answers() -> bool:
    """Any response counts, by way of the proxies and certificates that the hub's library uses."""
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
