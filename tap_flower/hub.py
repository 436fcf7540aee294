"""Whether the Hugging Face hub answers, asked once a process before anything is fetched from it."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

PATIENCE = 3.0
"""Seconds that the hub has to answer."""
log = logging.getLogger("tap_flower")


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


def absent(wanted: Iterable[tuple[str, str | None, str]]) -> list[tuple[str, str | None, str]]:
    """What cannot be had: neither a local folder, nor downloaded before, nor on a hub that answers.

    Args:
        wanted: (name, revision, `model` or `dataset`) of repositories on the hub, or local folders.
    """
    lacking = [one for one in wanted if not Path(one[0]).exists() and not _downloaded(*one)]
    return lacking if lacking and not _answers() else []


def _downloaded(name: str, revision: str | None, kind: str) -> bool:
    """Whether files of a repository are in the caches of the hub's libraries."""
    from huggingface_hub import constants, snapshot_download

    with suppress(OSError, ValueError):  # not there; no name of a repository
        snapshot = snapshot_download(name, repo_type=kind, revision=revision, local_files_only=True)
        return kind == "dataset" or any(Path(snapshot).glob("*.safetensors"))
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
    return kind == "dataset" and (prepared / name.replace("/", "___")).is_dir()


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
