"""Small files of finished runs, from which a sweep's tables are made again on any machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tap_flower.files import write_atomically
from tap_flower.report.configuration import CONFIG, portable, recorded
from tap_flower.report.results import RESULTS, read_results

_DIGITS = 6
"""Significant digits of kept numbers."""


def keep(runs: Sequence[Path], folder: Path) -> None:
    """Copies what tables need of finished runs: `LABEL/seed-N/results.json`, and one `LABEL/config.yaml` for all seeds.

    Numbers have six digits, the bytes of single components are left out, and clients are a hash of their specs. Nothing says
    where anything lay on this machine.

    Args:
        runs: run folders, LABEL/seed-N each; those in `folder` have been kept.
        folder: where they are copied to.

    Raises:
        StorageError: the results of a run are damaged.
    """
    for run in runs:
        if run.resolve().is_relative_to(folder.resolve()):
            continue
        results = read_results(run)
        results["bytes"] = {key: value for key, value in results["bytes"].items() if key != "per_component"}
        text = json.dumps(_rounded(results), separators=(",", ":"), ensure_ascii=False)
        text = text.replace(f"{run.resolve()}/", "")  # why a client is missing may name its files
        label = folder / run.parent.name
        config = yaml.safe_dump(portable(recorded(run)), sort_keys=False, allow_unicode=True)
        write_atomically(label / CONFIG, config.encode())
        write_atomically(label / run.name / RESULTS, f"{text}\n".encode())


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
