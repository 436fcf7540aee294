"""Configuration: every option, its default, its bounds and what it is for.

The order of precedence is: defaults < preset < file < `key=value` settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tap_flower.core.training import Optimisation
from tap_flower.data.spec import ClientSpec, SpecError, client_spec


class ConfigError(ValueError):
    """An option is wrong; the message names the key, the value and the remedy."""


class ReplacementSource(Enum):
    """What a replacement copies."""

    trained = "trained"
    received = "received"


class ReplacementEvidence(Enum):
    """What a replacement compares."""

    validation = "validation"
    training = "training"


def option(default: Any, text: str, low: float | None = None, high: float | None = None) -> Any:
    """A field of a configuration dataclass: default, help text, inclusive bounds."""
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass
class Margins:
    """By how much the server's copy must be better before it replaces, by kind of task."""

    image_classification: float = option(0.01, "in units of the kind's loss", 0.0, 1e6)
    text_generation: float = option(0.01, "in units of the kind's loss", 0.0, 1e6)
    text_classification: float = option(0.005, "in units of the kind's loss", 0.0, 1e6)
    image_generation: float = option(0.005, "in units of the kind's loss", 0.0, 1e6)


@dataclass
class DistillationWeights:
    """Weight w of the distillation loss, by kind of task."""

    image_classification: float = option(2e-3, "w of the kind", 0.0, 1e6)
    text_generation: float = option(2e-3, "w of the kind", 0.0, 1e6)
    text_classification: float = option(1.0, "w of the kind", 0.0, 1e6)
    image_generation: float = option(2e-3, "w of the kind", 0.0, 1e6)


@dataclass
class Model:
    """The model's shape; all clients of a run share it."""

    layers: int = option(1, "fusion layers L of each stage; the backbone needs 2L multimodal layers", 1, 64)
    text_length: int = option(256, "longest text and longest target, in tokens", 4, 4096)


@dataclass
class Train:
    """Local training in a round; the server's copy and the personal model train alike."""

    steps: int = option(20, "optimiser steps of one participation, R", 1, 100_000)
    batch_size: int = option(32, "examples in a batch", 1, 65_536)
    accumulation: int = option(4, "batches per optimiser step", 1, 1024)
    learning_rate: float = option(3e-4, "peak learning rate of AdamW", 0.0, 10.0)
    head_factor: float = option(1.0, "learning rate of the heads, as a multiple of the others'", 0.0, 1e3)
    start_learning_rate: float = option(1e-4, "learning rate of round 0; it rises linearly to the peak", 0.0, 10.0)
    warmup_rounds: int = option(20, "rounds until the peak", 1, 100_000)
    weight_decay: float = option(0.01, "weight decay of AdamW", 0.0, 10.0)
    clip_norm: float = option(1.0, "largest L2 norm of the gradient", 1e-6, 1e6)

    def optimisation(self, server_round: int) -> Optimisation:
        """What one participation in `server_round` (counted from 1) does: linear warm-up of the learning rate."""
        progress = min(server_round / self.warmup_rounds, 1.0)
        learning_rate = self.start_learning_rate + (self.learning_rate - self.start_learning_rate) * progress
        return Optimisation(self.steps, learning_rate, self.weight_decay, self.accumulation, self.clip_norm)


@dataclass
class Distill:
    """Stage 2."""

    iterations: int = option(50, "optimiser steps K of the fine-tuning, and again of the distillation", 1, 100_000)
    learning_rate: float = option(1e-4, "learning rate of AdamW", 0.0, 10.0)
    temperature: float = option(1.0, "temperature T of the softened outputs", 1e-3, 1e3)
    weight: DistillationWeights = field(default_factory=DistillationWeights)

    def optimisation(self, train: Train) -> Optimisation:
        """What stage 2 does; all but steps and learning rate are as in `train`."""
        return Optimisation(
            self.iterations, self.learning_rate, train.weight_decay, train.accumulation, train.clip_norm
        )


@dataclass
class Replacement:
    """Stage 1's adaptive replacement."""

    source: ReplacementSource = option(
        ReplacementSource.trained, "trained: the locally trained copy; received: the weights as they came"
    )
    evidence: ReplacementEvidence = option(
        ReplacementEvidence.validation, "validation: held-out local examples; training: the training losses"
    )
    margin: Margins = field(default_factory=Margins)


@dataclass
class Metrics:
    """Metrics that need the extra `text-metrics` and files of their own; a node has these in its own settings."""

    meteor: bool = option(False, "METEOR of generated texts; needs nltk and WordNet")
    bertscore: str = option("", "BERTScore F1 of generated texts: the model's name or folder; empty: none")


@dataclass
class HyperParameters:
    """What the server sets on the clients, and all that it sets."""

    seed: int = option(41, "seed of the run", 0, 2**62)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    distill: Distill = field(default_factory=Distill)
    replacement: Replacement = field(default_factory=Replacement)


@dataclass
class Config(HyperParameters):
    """A run."""

    preset: str = option("demo", "name of the preset that this configuration came from")
    rounds: int = option(200, "rounds of stage 1", 1, 1_000_000)
    clients_per_round: int = option(2, "clients that are sampled in a round", 1, 1_000_000)
    round_timeout: float = option(3600.0, "seconds until a client that has not answered is left out", 1.0, 1e7)
    start_timeout: float = option(120.0, "seconds to wait for the clients before the first round", 1.0, 1e7)
    metrics: Metrics = field(default_factory=Metrics)
    clients: list[Any] = field(
        default_factory=list, metadata={"help": "the client specs of a simulation", "low": None, "high": None}
    )


def presets() -> dict[str, Path]:
    """Name -> file of every preset."""
    folder = Path(str(files("tap_flower") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(preset: str = "demo", config: str = "", settings: Sequence[str] = ()) -> Config:
    """Resolves a configuration.

    Args:
        preset: name of a preset.
        config: path of a YAML file, or nothing.
        settings: `key=value` strings, such as `train.steps=5`.

    Raises:
        ConfigError: a preset, file, key or value is wrong.
    """
    known = presets()
    if preset not in known:
        raise ConfigError(f"unknown preset {preset!r}{_near(preset, known)}: use one of {', '.join(known)}")
    layers: list[tuple[str, Mapping[str, Any]]] = [(f"preset {preset!r}", read_yaml(known[preset]))]
    if config:
        layers.append((f"file {config!r}", read_yaml(Path(config))))
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise ConfigError(f"setting {setting!r} has no '=': write key=value, such as train.steps=5")
        layers.append((f"setting {setting!r}", _nested(key.strip(), yaml.safe_load(value))))
    return cast(Config, _structured(Config, [*layers, ("preset name", {"preset": preset})]))


def hyper_parameters(values: Mapping[str, Any]) -> HyperParameters:
    """Checks what a server sent against the schema and its bounds.

    Raises:
        ConfigError: a key is unknown, or a value is out of bounds or an interpolation.
    """
    if "${" in str(values):  # OmegaConf would read this node's environment for it
        raise ConfigError("the server: interpolations (${...}) are not accepted in hyper-parameters")
    return cast(HyperParameters, _structured(HyperParameters, [("the server", values)]))


def sent_hyper_parameters(config: Config) -> dict[str, Any]:
    """The part of a configuration that is sent to clients, as nested plain values."""
    return {name: value for name, value in plain(config).items() if name in {f.name for f in fields(HyperParameters)}}


def client_specs(config: Config) -> list[ClientSpec]:
    """The client specs of a simulation.

    Raises:
        ConfigError: a spec is wrong, or two clients share a name.
    """
    try:
        specs = [client_spec(values) for values in config.clients]
    except SpecError as error:
        raise ConfigError(str(error)) from error
    names = [spec.name for spec in specs]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two clients are named {double[0]!r}: give every client its own name")
    return specs


def plain(config: HyperParameters) -> dict[str, Any]:
    """A configuration as nested dictionaries of plain values, enums by name."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))


def to_yaml(config: Config) -> str:
    """A configuration as YAML that `load_config` reads."""
    return str(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))


def options(schema: type[Any] = Config, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(key, default, metadata with help text and bounds) of every option, nested keys with dots."""
    instance = schema()
    for f in fields(schema):
        value = getattr(instance, f.name)
        if is_dataclass(value):
            yield from options(type(value), f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value, f.metadata


def _structured(schema: type[Any], layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    known = {key: metadata for key, _, metadata in options(schema)}
    merged = OmegaConf.structured(schema)
    for where, values in layers:
        for key in _leaves(values, known):
            if key not in known:
                raise ConfigError(f"{where}: unknown key {key!r}{_near(key, known)}")
        try:
            merged = OmegaConf.merge(merged, values)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "?"
            raise ConfigError(f"{where}: {key}: {str(error).splitlines()[0]}") from error
        for key, metadata in known.items():
            low, high = metadata["low"], metadata["high"]
            value = OmegaConf.select(merged, key)
            if value is None:
                raise ConfigError(f"{where}: {key} has no value: give one")
            if low is not None and not low <= value <= high:
                raise ConfigError(f"{where}: {key} = {value} is out of bounds: choose between {low:g} and {high:g}")
    return OmegaConf.to_object(merged)


def _leaves(values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known and any(k.startswith(f"{key}.") for k in known):
            yield from _leaves(value, known, f"{key}.")
        else:
            yield key


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


def read_yaml(path: Path, what: str = "file") -> Mapping[str, Any]:
    """Reads a YAML file of keys; `what` begins the errors.

    Raises:
        ConfigError: the file cannot be read, or holds no keys.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{what} {str(path)!r} cannot be read: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what} {str(path)!r} holds no keys: write `key: value` lines")
    # `definitions` is a place for YAML anchors; they have been put where they are used by now.
    return {key: value for key, value in values.items() if key != "definitions"}


def _near(word: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
