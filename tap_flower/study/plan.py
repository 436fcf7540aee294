"""Plans the runs of a sweep from a YAML file of methods, seeds and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tap_flower.config import Config, client_specs, load_config, plain, read_yaml
from tap_flower.errors import ConfigError
from tap_flower.methods.registry import find_method
from tap_flower.report.results import RESULTS

_KEYS = ("preset", "config", "seeds", "set", "methods")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        label: label of the method or variant.
        seed: seed of the run.
        preset: name of a preset.
        config: path of a YAML file, or nothing.
        settings: `key=value` strings, method and seed among them.
        folder: the run folder.
    """

    label: str
    seed: int
    preset: str
    config: str
    settings: tuple[str, ...]
    folder: Path

    @property
    def resolved(self) -> Config:
        """The run's configuration.

        Raises:
            ConfigError: a key or a value is wrong, or there is no such method.
        """
        try:
            found = load_config(self.preset, self.config, self.settings)
            find_method(found.method)
        except ConfigError as error:
            raise ConfigError(f"{self.label}: {error}") from error
        return found

    @property
    def log(self) -> Path:
        """The run's log, which is beside its folder: that must be empty when the run starts."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def done(self) -> bool:
        """Whether the run has finished."""
        return (self.folder / RESULTS).exists()


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Attributes:
        runs: the runs in the order of seeds, then of methods: after some seeds there is something to compare already.
        result: label -> name of the model that the method is judged by.
        reference: the label that the others are compared with.
    """

    runs: tuple[PlannedRun, ...]
    result: Mapping[str, str]
    reference: str


def read_sweep(file: Path, out: Path) -> Sweep:
    """Reads a sweep and checks every run of it before the first one starts.

    The file has `seeds`, a list; `methods`, a list of names, or a mapping of labels to settings (`method` among them where
    it is not the label); and where they are needed `preset` (demo), `config` (a YAML file, as `simulate --config`) and
    `set`, settings of all runs (`train.steps: 10`).

    Args:
        file: the YAML file.
        out: folder of the sweep; that of a run is OUT/LABEL/seed-N.

    Raises:
        ConfigError: something in the file is wrong, or a folder holds a finished run of another configuration.
    """
    values = read_yaml(file, "sweep file")
    if unknown := values.keys() - set(_KEYS):
        raise ConfigError(f"{file}: unknown {', '.join(sorted(map(repr, unknown)))}: use {', '.join(_KEYS)}")
    seeds = values.get("seeds", [])
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds) or len({*seeds}) < len(seeds):
        raise ConfigError(f"{file}: seeds is {seeds!r}: list different whole numbers, such as [41, 42, 43]")
    methods = _labelled(file, values.get("methods", []))
    common = _settings(file, "set", values.get("set", {}))
    config = str(file.resolve().parent / values["config"]) if "config" in values else ""
    preset = str(values.get("preset", "demo"))
    runs = tuple(
        PlannedRun(
            label,
            seed,
            preset,
            config,
            (*common, f"method={method}", *own, f"seed={seed}"),
            out / label / f"seed-{seed}",
        )
        for seed in seeds
        for label, (method, own) in methods.items()
    )
    for run in runs:
        _check(run)
    result = {label: find_method(method).result for label, (method, _) in methods.items()}
    return Sweep(runs, result, "tap" if "tap" in methods else next(iter(methods)))


def _labelled(file: Path, methods: Any) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Label -> (method, settings)."""
    if not isinstance(methods, Mapping | list) or not methods:
        raise ConfigError(f"{file}: methods is {methods!r}: list names of methods, or write `label: settings` lines")
    found = {}
    for label, settings in ({name: {} for name in methods} if isinstance(methods, list) else methods).items():
        own = dict(settings or {}) if isinstance(settings, Mapping) or settings is None else None
        if own is None or Path(str(label)).name != str(label):
            raise ConfigError(
                f"{file}: methods has {label!r}: {settings!r}; write a plain label and its settings, such as "
                f"`no-replacement: {{method: tap, replacement.enabled: false}}`"
            )
        method = str(own.pop("method", label))
        found[str(label)] = method, _settings(file, str(label), own)
    return found


def _settings(file: Path, where: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{file}: {where} is {values!r}: write `key: value` lines, such as `train.steps: 10`")
    for key, value in values.items():
        if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
            raise ConfigError(
                f"{file}: {where} has {key}: {value!r}; write one line for each number, with dots in its key"
            )
        if " " in str(value):
            raise ConfigError(f"{file}: {where} has {key}: {value!r}; a value with spaces goes into the `config` file")
    return tuple(f"{key}={_plain(value)}" for key, value in values.items())


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check(run: PlannedRun) -> None:
    resolved = run.resolved
    if not client_specs(resolved):
        raise ConfigError(f"preset {run.preset!r} has no clients: name a `config` file with client specs")
    if run.done:
        old, new = read_yaml(run.folder / "config.yaml"), plain(resolved)
        if different := sorted(key for key in new if old.get(key) != new[key]):
            raise ConfigError(
                f"{run.folder} holds a run with another configuration ({', '.join(different)} differ): give another "
                f"folder with --out, or remove this one"
            )
