"""Resolves configurations: defaults < preset < file < `key=value` settings, checked against the options and their bounds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import date, datetime
from enum import Enum
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import msgspec
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tap_flower.config.options import (
    Compute,
    Config,
    HyperParameters,
    ReplacementEvidence,
    ReplacementMode,
    ReplacementSource,
    options,
)
from tap_flower.config.patterns import expand
from tap_flower.data.spec import ClientSpec, TaskSpec, client_spec
from tap_flower.errors import ConfigError, SpecError
from tap_flower.plain import DEEPEST, PlainError, did_you_mean, leaves, parse_yaml, shown

Layer = tuple[str, Mapping[str, Any]]
"""(where values come from, for errors; nested keys and values)."""


def presets() -> dict[str, Path]:
    """Name -> YAML file of every preset."""
    folder = Path(str(files("tap_flower") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(preset: str = "demo", config: str = "", settings: Sequence[str] = ()) -> Config:
    """Resolves the configuration of a run.

    Args:
        preset: name of a preset.
        config: path of a YAML file that overrides the preset, or nothing.
        settings: `key=value` strings that override both, such as `train.steps=5`.

    Raises:
        ConfigError: a preset, file, key or value is wrong, or two values do not go together.
    """
    known = presets()
    if preset not in known:
        raise ConfigError(f"unknown preset {preset!r}{did_you_mean(preset, known)}: use one of {', '.join(known)}")
    layers: list[Layer] = [(f"preset {preset!r}", read_yaml(known[preset]))]
    if config:
        layers.append((f"file {config!r}", read_yaml(Path(config))))
    own = [_setting(setting) for setting in settings]
    layers += own
    for where, values in layers:
        if (other := values.get("preset", preset)) != preset:
            raise ConfigError(
                f"{where} has preset {other!r}, and the run has {preset!r}: choose one (`--preset {other}`)"
            )
    resolved = cast(Config, _merged(Config, [*layers, ("preset name", {"preset": preset})]))
    for key, value, is_path in (
        ("data.root", resolved.data.root, bool(resolved.data.root)),
        ("backbone", resolved.backbone, resolved.backbone.startswith(".")),
        ("metrics.bertscore", resolved.metrics.bertscore, resolved.metrics.bertscore.startswith(".")),
    ):
        if is_path and not Path(value).is_absolute():
            raise ConfigError(f"{key} = {value!r} is relative: give an absolute path in a setting")
    _check_hyper_parameters(resolved)
    _check_privacy(resolved)
    listed = next((where for where, values in layers if "clients" in values), None)
    for where, values in own:
        if listed and (idle := values.keys() & {"patterns", "groups", "datasets"}):
            raise ConfigError(
                f"{where}: {min(idle)} makes no clients where {listed} lists them: leave one of the two out"
            )
    if listed is None:  # an explicit empty list means no clients
        try:
            resolved.clients = list(expand(resolved.patterns, resolved.groups, resolved.datasets))
        except SpecError as error:
            raise ConfigError(str(error)) from error
    return resolved


def check_contradictions(settings: Sequence[str]) -> None:
    """Refuses settings of one command that give an option two values.

    Raises:
        ConfigError: with both settings.
    """
    given: dict[str, tuple[str, Any]] = {}
    for setting in settings:
        where, values = _setting(setting)
        for key, value in leaves(values):
            other, before = given.setdefault(key, (where, value))
            if before != value:
                raise ConfigError(f"{other} and {where} give {key} two values: leave one of them out")


def _setting(setting: str) -> Layer:
    key, separator, text = setting.partition("=")
    if not separator:
        raise ConfigError(f"setting {setting!r} has no '=': write key=value, such as train.steps=5")
    if key.count(".") > DEEPEST:
        raise ConfigError(f"setting {shown(setting)} has a key of more than {DEEPEST} parts: shorten it")
    try:
        value = parse_yaml(text)
    except PlainError as error:
        raise ConfigError(f"setting {shown(setting)}: {error}") from error
    for name in reversed(key.strip().split(".")):
        value = {name: value}
    return f"setting {setting!r}", value


def _check_hyper_parameters(settings: HyperParameters) -> None:
    """Refuses values that do not go together."""
    _check_replacement(settings)
    _check_learning_rate(settings)
    _check_pfedme(settings)


def _check_replacement(settings: HyperParameters) -> None:
    """Refuses evidence that a decision on replacement cannot be made on."""
    chosen = settings.replacement
    if chosen.source is ReplacementSource.received and chosen.evidence is ReplacementEvidence.training:
        raise ConfigError(
            "replacement.source = received and replacement.evidence = training: training losses are measured on the "
            "trained weights, not on the received ones; set replacement.evidence=validation, or replacement.source=trained"
        )
    held_out = [
        ("replacement.mode = mix", "replacement.mode=hard", chosen.mode is ReplacementMode.mix),
        ("replacement.before_stage_two = true", "replacement.before_stage_two=false", chosen.before_stage_two),
        ("replacement.after_stage_two = true", "replacement.after_stage_two=false", chosen.after_stage_two),
        ("distill.only_better = true", "distill.only_better=false", settings.distill.only_better),
    ]
    if chosen.evidence is ReplacementEvidence.training and (needing := [each for each in held_out if each[2]]):
        without = " and ".join(remedy for _, remedy, _ in needing)
        raise ConfigError(
            f"{needing[0][0]} and replacement.evidence = training: it compares losses of held-out examples; set "
            f"replacement.evidence=validation, or {without}"
        )


def _check_learning_rate(settings: HyperParameters) -> None:
    """Refuses a warm-up that begins above the peak."""
    train = settings.train
    if train.start_learning_rate is not None and train.start_learning_rate > train.learning_rate:
        raise ConfigError(
            f"train.start_learning_rate = {train.start_learning_rate:g} is above train.learning_rate = "
            f"{train.learning_rate:g}, its peak: lower it, or set train.start_learning_rate=null for no warm-up"
        )


def _check_pfedme(settings: HyperParameters) -> None:
    """Refuses a step of w that goes beyond θ."""
    rate, weight = settings.baselines.pfedme_rate, settings.baselines.pfedme_lambda
    if rate * weight > 1:
        raise ConfigError(
            f"baselines.pfedme_rate = {rate:g} and baselines.pfedme_lambda = {weight:g}: their product is above 1, and w "
            f"would go beyond θ; choose a rate of at most {1 / weight:.3g}"
        )


def _check_privacy(config: Config) -> None:
    """Refuses what does not go together with differential privacy."""
    if config.privacy.epsilon is None:
        return
    if config.stopping.patience:
        raise ConfigError(
            f"privacy.epsilon = {config.privacy.epsilon:g} and stopping.patience = {config.stopping.patience}: which round "
            f"is best is told to all clients, comes from validation scores, and is not covered by ε; set stopping.patience=0"
        )
    if config.aggregation.clip_norm is not None:
        raise ConfigError(
            f"privacy.epsilon = {config.privacy.epsilon:g} and aggregation.clip_norm = {config.aggregation.clip_norm:g}: a "
            f"private run clips to privacy.clip_norm = {config.privacy.clip_norm:g}; leave aggregation.clip_norm null"
        )


def sent_hyper_parameters(config: Config) -> dict[str, Any]:
    """The part of a configuration that the server sends to clients, as nested plain values."""
    sent: dict[str, Any] = {f.name: _plain(getattr(config, f.name)) for f in fields(HyperParameters)}
    # The rest is the node's own: a server must not start a compiler there.
    sent["compute"] = {f.name: sent["compute"][f.name] for f in fields(Compute)}
    return sent


def hyper_parameters(values: Mapping[str, Any]) -> HyperParameters:
    """Checks the hyper-parameters that a server sent.

    Args:
        values: nested plain values, as `sent_hyper_parameters` gives them; what is missing has its default.

    Raises:
        ConfigError: a key is unknown, a value is out of bounds or an interpolation, or two values do not go together.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"the server: the hyper-parameters are {shown(values)}, not keys and values")
    if "${" in str(values):  # OmegaConf would read this node's environment for it
        raise ConfigError("the server: interpolations (${...}) are not accepted in hyper-parameters")
    found = cast(HyperParameters, _merged(HyperParameters, [("the server", values)]))
    _check_hyper_parameters(found)
    return found


@lru_cache(maxsize=16)
def hyper_parameters_of(sent: str) -> HyperParameters:
    """The hyper-parameters of a run from their JSON, which all clients of a process share; see `hyper_parameters`."""
    return hyper_parameters(json.loads(sent))


def client_specs(config: Config) -> list[ClientSpec]:
    """Reads the client specs of a simulation from its configuration.

    Raises:
        ConfigError: a spec is wrong, two clients share a name, or they mean something else by the name of a task.
    """
    try:
        specs = [client_spec(values) for values in spec_values(config)]
    except SpecError as error:
        raise ConfigError(str(error)) from error
    names = [spec.name for spec in specs]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two clients are named {double[0]!r}: give every client its own name")
    first: dict[str, tuple[ClientSpec, TaskSpec]] = {}
    for spec in specs:
        for task in spec.tasks:
            other, theirs = first.setdefault(task.name, (spec, task))
            where = f"task {task.name!r} of client {spec.name!r}"
            if task.kind != theirs.kind:
                raise ConfigError(
                    f"{where} is of kind {task.kind}, and client {other.name!r} has it with {theirs.kind}: use one kind, or "
                    f"give the tasks two names"
                )
            if task.classes != theirs.classes:
                raise ConfigError(
                    f"{where} has other classes than on client {other.name!r}, or in another order: list the same classes "
                    f"in the same order on both, or give the tasks two names"
                )
    return specs


def spec_values(config: Config) -> list[Any]:
    """The clients of a configuration as they are written there, with the run's backbone where they name none."""
    own = {"backbone": config.backbone, "revision": config.backbone_revision}
    return [
        {**own, **values} if isinstance(values, Mapping) and "backbone" not in values else values
        for values in config.clients
    ]


def plain(config: HyperParameters) -> dict[str, Any]:
    """A configuration as nested dictionaries of plain values, enums by name."""
    return cast(dict[str, Any], _plain(config))


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value, builtin_types=(date, datetime))  # which YAML writes as such


def to_yaml(config: Config) -> str:
    """A configuration as YAML that `load_config` reads."""
    return str(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))


def _merged(schema: type[Any], layers: Sequence[Layer]) -> Any:
    """An instance of `schema` with the values of the layers, the last of which counts."""
    known = {key: metadata for key, _, metadata in options(schema)}
    usual = {key: value for key, value, _ in options(schema)}
    merged = OmegaConf.structured(schema)
    for where, values in layers:
        given = dict(_leaves(where, values, known))
        for key in given:
            if key not in known and "tasks" in values:
                raise ConfigError(
                    f"{where}: this is a client spec: give a file that has it in a list, under `clients:`"
                )
            if inner := [name for name in known if name.startswith(f"{key}.")]:
                raise ConfigError(
                    f"{where}: {key!r} stands for several options: set {', '.join(inner[:5])}{', …' * (len(inner) > 5)}"
                )
            if key not in known:
                raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}")
            _check_form(where, key, given[key], usual[key], bool(known[key].get("optional")))
        with _told(where, known):
            merged.merge_with(values)
        _check_bounds(where, merged, {key: known[key] for key in given})
    _check_bounds("the configuration", merged, known)  # an interpolation may have changed with what it refers to
    with _told("the configuration"):
        return OmegaConf.to_object(merged)


def _check_form(where: str, key: str, value: Any, usual: Any, optional: bool) -> None:
    """Refuses a value that OmegaConf has no good words for, or makes something else of."""
    listed = value if isinstance(value, list) else [value]
    if value is None and not optional:
        raise ConfigError(f"{where}: {key} has no value: give one")
    if isinstance(usual, list) and not isinstance(value, list) and "${" not in str(value):
        raise ConfigError(f"{where}: {key} is {shown(value)}: give a list, as YAML writes it")
    if isinstance(usual, str | list) and not isinstance(usual, Enum) and any(isinstance(one, bool) for one in listed):
        raise ConfigError(
            f"{where}: {key} is {shown(value)}, and YAML reads yes, no, on and off as true or false: put a text in quotes"
        )


def _check_bounds(where: str, merged: Any, known: Mapping[str, Mapping[str, Any]]) -> None:
    for key, metadata in known.items():
        with _told(where):
            value = OmegaConf.select(merged, key)
        low, high = metadata["low"], metadata["high"]
        if value is None:
            if not metadata.get("optional"):
                raise ConfigError(f"{where}: {key} has no value: give one")
        elif low is not None and not low <= value <= high:
            raise ConfigError(f"{where}: {key} = {value} is out of bounds: choose between {low:g} and {high:g}")


@contextmanager
def _told(where: str, known: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> Iterator[None]:
    """Makes a ConfigError of what OmegaConf raises, with the bounds of the key, and of what it lets through."""
    try:
        yield
    except (OmegaConfBaseException, ArithmeticError, AttributeError, TypeError, ValueError) as error:
        key = getattr(error, "full_key", None) or "?"
        low, high = (known.get(key, {}).get(bound) for bound in ("low", "high"))
        remedy = "" if low is None else f": choose a number between {low:g} and {high:g}"
        words = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{where}: {key}: {words}{remedy}") from error


def _leaves(
    where: str, values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(keys with dots, value) of nested values, down to the options in `known`, whose own values may be mappings."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if "." in str(name) and key in known:
            group, _, option = key.rpartition(".")
            raise ConfigError(f"{where}: {name!r} is no key of a file: write `{option}` below `{group}:`")
        if isinstance(value, Mapping) and key not in known and any(k.startswith(f"{key}.") for k in known):
            yield from _leaves(where, value, known, f"{key}.")
        else:
            yield key, value


def read_yaml(path: Path, what: str = "file") -> Mapping[str, Any]:
    """Reads a YAML file of keys and values; relative paths in it start at its folder.

    Args:
        path: of the file.
        what: what kind of file it is, for errors.

    Raises:
        ConfigError: the file cannot be read, or holds no keys.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{what} {str(path)!r} cannot be read: there is no such file; a path starts at the folder of the command"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} {str(path)!r} cannot be read: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what} {str(path)!r} holds no keys: write `key: value` lines")
    # `definitions` is a place for YAML anchors; they have been put where they are used by now.
    return {key: _anchored(key, value, path.resolve().parent) for key, value in values.items() if key != "definitions"}


def _anchored(key: str, value: Any, folder: Path) -> Any:
    """`value` with its relative paths made absolute: what is named `path` or `root`, and models that begin with a dot."""
    if isinstance(value, Mapping):
        return {name: _anchored(name, inner, folder) for name, inner in value.items()}
    if isinstance(value, list):
        return [_anchored(key, inner, folder) for inner in value]
    is_path = key in ("path", "root") or (key in ("backbone", "bertscore") and str(value).startswith("."))
    return str(folder / value) if is_path and isinstance(value, str) and value else value
