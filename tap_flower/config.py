"""Configuration: every option, its default, its bounds and what it is for.

The order of precedence is: defaults < preset < file < `key=value` settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from tap_flower.data.presets import expand
from tap_flower.data.spec import ClientSpec, client_spec
from tap_flower.errors import ConfigError, SpecError
from tap_flower.plain import DEEPEST, PlainError, parse_yaml, shown


class ReplacementSource(Enum):
    """What a replacement copies."""

    trained = "trained"
    received = "received"


class ReplacementEvidence(Enum):
    """What a replacement compares."""

    validation = "validation"
    training = "training"


class StageTwo(Enum):
    """What TAP's stage 2 does with the personal model."""

    distillation = "distillation"
    finetuning = "finetuning"
    finetuning_twice = "finetuning_twice"


class Encoding(Enum):
    """How tensors travel."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


class Precision(Enum):
    """In what models compute; their trainable tensors are float32 in both."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def option(default: Any, text: str, low: float | None = None, high: float | None = None) -> Any:
    """A field of a configuration dataclass: default, help text, inclusive bounds. With the default None it may be null."""
    return field(default=default, metadata={"help": text, "low": low, "high": high, "optional": default is None})


def collection(kind: type[Any], text: str) -> Any:
    """A field of a configuration dataclass that holds a list or a dictionary, empty by default."""
    return field(default_factory=kind, metadata={"help": text, "low": None, "high": None})


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
    image_size: int | None = option(
        None,
        "side of the images that the backbone's patches are cut from, in pixels; null is the checkpoint's own",
        1,
        4096,
    )


@dataclass
class Compute:
    """How models compute; it changes no result beyond the precision."""

    precision: Precision = option(
        Precision.float32, "bfloat16, where there are products for it: frozen weights, activations; the rest is float32"
    )
    recompute: bool = option(
        False, "gradient checkpointing: the inside of each layer again in the backward pass; less memory, more time"
    )
    compile: bool = option(False, "torch.compile: minutes at first, in each process; needs a C++ compiler")


@dataclass
class Train:
    """Local training in a round; the server's copy and the personal model train alike."""

    steps: int = option(20, "optimiser steps of one participation, R", 1, 100_000)
    batch_size: int = option(32, "examples in a batch", 1, 65_536)
    accumulation: int = option(4, "batches per optimiser step", 1, 1024)
    group_by_length: bool = option(
        False,
        "texts of about one length share a batch: less padding, but less mixed batches where the length tells the label",
    )
    learning_rate: float = option(3e-4, "peak learning rate of AdamW", 0.0, 10.0)
    head_factor: float = option(1.0, "learning rate of the heads, as a multiple of the others'", 0.0, 1e3)
    start_learning_rate: float = option(
        1e-4, "learning rate of the first round; it rises linearly to the peak", 0.0, 10.0
    )
    warmup_rounds: int = option(20, "rounds from the first to the one at the peak", 1, 100_000)
    weight_decay: float = option(0.01, "weight decay of AdamW", 0.0, 10.0)
    clip_norm: float = option(1.0, "largest L2 norm of the gradient", 1e-6, 1e6)

    def optimisation(self, server_round: int) -> Optimisation:
        """What one participation in `server_round` (counted from 1) does: linear warm-up of the learning rate."""
        progress = min((server_round - 1) / self.warmup_rounds, 1.0)
        learning_rate = self.start_learning_rate + (self.learning_rate - self.start_learning_rate) * progress
        return Optimisation(self.steps, learning_rate, self.weight_decay, self.accumulation, self.clip_norm)


@dataclass
class Distill:
    """Stage 2."""

    iterations: int = option(50, "optimiser steps K of the fine-tuning, and again of the distillation", 1, 100_000)
    learning_rate: float = option(1e-4, "learning rate of AdamW", 0.0, 10.0)
    temperature: float = option(1.0, "temperature T of the softened outputs", 1e-3, 1e3)
    stage: StageTwo = option(
        StageTwo.distillation,
        "of method tap; ablations: finetuning is without a teacher, finetuning_twice also takes the teacher's K steps",
    )
    weight: DistillationWeights = field(default_factory=DistillationWeights)

    def optimisation(self, train: Train) -> Optimisation:
        """What stage 2 does; all but steps and learning rate are as in `train`."""
        return Optimisation(
            self.iterations, self.learning_rate, train.weight_decay, train.accumulation, train.clip_norm
        )


@dataclass
class Replacement:
    """Stage 1's adaptive replacement."""

    enabled: bool = option(True, "false: the ablation without replacement")
    source: ReplacementSource = option(
        ReplacementSource.trained, "trained: the locally trained copy; received: the weights as they came"
    )
    evidence: ReplacementEvidence = option(
        ReplacementEvidence.validation, "validation: held-out local examples; training: the training losses"
    )
    margin: Margins = field(default_factory=Margins)


@dataclass
class Baselines:
    """Numbers of the methods that TAP is compared with, in their papers' notation."""

    fedprox_mu: float = option(0.01, "μ of fedprox: weight of its penalty", 0.0, 1e6)
    ditto_lambda: float = option(0.1, "λ of ditto: how near the personal model stays to the server's", 0.0, 1e6)
    pfedme_lambda: float = option(15.0, "λ of pfedme: likewise", 0.0, 1e6)
    pfedme_rate: float = option(0.05, "η of pfedme: w ← w − η·λ·(w − θ)", 0.0, 1e6)
    pfedme_inner_steps: int = option(5, "K of pfedme: optimiser steps of θ for each step of w", 1, 100_000)
    per_fedavg_rate: float = option(0.01, "α of per-fedavg: rate of the step that it looks ahead", 0.0, 1e3)


@dataclass
class Wire:
    """What server and clients send each other; both directions alike."""

    encoding: Encoding = option(
        Encoding.float32, "of tensors: float32 as they are; bfloat16 half the bytes; int8 a quarter, with scales"
    )


@dataclass
class Metrics:
    """Metrics that need the extra `text-metrics` and files of their own; a node has these in its own settings."""

    meteor: bool = option(False, "METEOR of generated texts; needs nltk and WordNet")
    bertscore: str = option("", "BERTScore F1 of generated texts: the model's name or folder; empty: none")


@dataclass
class Aggregation:
    """The server's averaging."""

    clip_norm: float | None = option(
        None,
        "largest L2 norm of a client's update (returned minus sent, all tensors together); a longer one is scaled down; "
        "null: any",
        1e-6,
        1e6,
    )


@dataclass
class Privacy:
    """Differential privacy of clients towards each other, see the page on privacy."""

    epsilon: float | None = option(None, "ε of the whole run; null: no differential privacy", 0.1, 100.0)
    delta: float = option(1e-5, "δ: choose it well below 1 / number of clients", 1e-12, 1e-2)
    clip_norm: float = option(
        1.0, "C: largest L2 norm of a client's update, all tensors together; longer ones are scaled down", 1e-3, 1e3
    )
    max_noise: float = option(
        0.1,
        "largest standard deviation of the noise on a component's mean, in units of C; a component with too few clients in "
        "a round for it is not updated in that round",
        1e-6,
        1e3,
    )


@dataclass
class Stopping:
    """Early stopping by the mean validation score of the clients' own models."""

    patience: int = option(
        0, "rounds without a better one until stage 1 ends, and stage 2 starts from the best; 0: never", 0, 1_000_000
    )


@dataclass
class HyperParameters:
    """What the server sets on the clients, and all that it sets."""

    method: str = option("tap", "name of the method, see the page on methods")
    seed: int = option(41, "seed of the run", 0, 2**62)
    model: Model = field(default_factory=Model)
    compute: Compute = field(default_factory=Compute)
    train: Train = field(default_factory=Train)
    distill: Distill = field(default_factory=Distill)
    replacement: Replacement = field(default_factory=Replacement)
    baselines: Baselines = field(default_factory=Baselines)
    stopping: Stopping = field(default_factory=Stopping)
    wire: Wire = field(default_factory=Wire)

    @property
    def needs_validation(self) -> bool:
        """Whether a task without validation rows of its own sets a part of its training examples aside."""
        return self.replacement.evidence is ReplacementEvidence.validation or self.stopping.patience > 0


@dataclass
class Data:
    """Where the clients of a simulation find their data."""

    root: str = option(
        "", "a folder with a mirror of the hub data sets, OWNER/NAME[/CONFIG]; without it, the hub is used"
    )


@dataclass
class Config(HyperParameters):
    """A run."""

    preset: str = option("demo", "name of the preset that this configuration came from")
    rounds: int = option(200, "rounds of stage 1", 1, 1_000_000)
    clients_per_round: int = option(2, "clients that are sampled in a round", 1, 1_000_000)
    round_timeout: float = option(3600.0, "seconds until a client that has not answered is left out", 1.0, 1e7)
    start_timeout: float = option(120.0, "seconds to wait for the clients before the first round", 1.0, 1e7)
    trackers: str = option("", "where else events go, with commas between: tensorboard, mlflow, wandb")
    aggregation: Aggregation = field(default_factory=Aggregation)
    privacy: Privacy = field(default_factory=Privacy)
    data: Data = field(default_factory=Data)
    metrics: Metrics = field(default_factory=Metrics)
    backbone: str = option(
        "demo", "of the clients that name none: demo, a local folder (absolute, or ./...) or a hub id"
    )
    backbone_revision: str | None = option(None, "commit, tag or branch of `backbone` on the hub")
    clients: list[Any] = collection(
        list, "the client specs of a simulation; without any, they are made from `patterns`"
    )
    patterns: list[Any] = collection(list, "clients that every group has, see the presets flava and vilt")
    groups: int = option(1, "groups that share the rows of `datasets`; each has all `patterns`", 1, 100_000)
    datasets: dict[str, Any] = collection(
        dict, "the data sets that `patterns` name: name, config, revision, rows to share"
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
        if key.count(".") > DEEPEST:
            raise ConfigError(f"setting {shown(setting)} has a key of more than {DEEPEST} parts: shorten it")
        try:
            layers.append((f"setting {setting!r}", _nested(key.strip(), parse_yaml(value))))
        except PlainError as error:
            raise ConfigError(f"setting {shown(setting)}: {error}") from error
    resolved = cast(Config, _structured(Config, [*layers, ("preset name", {"preset": preset})]))
    if resolved.data.root and not Path(resolved.data.root).is_absolute():
        raise ConfigError(f"data.root = {resolved.data.root!r} is relative: give an absolute path in a setting")
    _check_privacy(resolved)
    resolved.clients = resolved.clients or _expanded(resolved)
    return resolved


def _check_privacy(config: Config) -> None:
    """What does not go together with differential privacy."""
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


def _expanded(config: Config) -> list[Any]:
    try:
        return list(expand(config.patterns, config.groups, config.datasets))
    except SpecError as error:
        raise ConfigError(str(error)) from error


def hyper_parameters(values: Mapping[str, Any]) -> HyperParameters:
    """Checks what a server sent against the schema and its bounds.

    Raises:
        ConfigError: a key is unknown, or a value is out of bounds or an interpolation.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"the server: the hyper-parameters are {shown(values)}, not keys and values")
    if "${" in str(values):  # OmegaConf would read this node's environment for it
        raise ConfigError("the server: interpolations (${...}) are not accepted in hyper-parameters")
    return cast(HyperParameters, _structured(HyperParameters, [("the server", values)]))


def sent_hyper_parameters(config: Config) -> dict[str, Any]:
    """The part of a configuration that is sent to clients, as nested plain values."""
    return plain(HyperParameters(**{f.name: getattr(config, f.name) for f in fields(HyperParameters)}))


def client_specs(config: Config) -> list[ClientSpec]:
    """The client specs of a simulation.

    Raises:
        ConfigError: a spec is wrong, or two clients share a name.
    """
    try:
        own = {"backbone": config.backbone, "revision": config.backbone_revision}
        specs = [
            client_spec({**values, **own} if isinstance(values, Mapping) and "backbone" not in values else values)
            for values in config.clients
        ]
    except SpecError as error:
        raise ConfigError(str(error)) from error
    names = [spec.name for spec in specs]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two clients are named {double[0]!r}: give every client its own name")
    return specs


def plain(config: HyperParameters) -> dict[str, Any]:
    """A configuration as nested dictionaries of plain values, enums by name."""
    return cast(dict[str, Any], _plain(config))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.name if isinstance(value, Enum) else value


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
        keys = list(_leaves(values, known))
        for key in keys:
            if key not in known:
                raise ConfigError(f"{where}: unknown key {key!r}{_near(key, known)}")
        with _told(where):
            merged.merge_with(values)
        _check_bounds(where, merged, {key: known[key] for key in keys})
    _check_bounds("the configuration", merged, known)  # an interpolation may have changed with what it refers to
    with _told("the configuration"):
        return OmegaConf.to_object(merged)


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
def _told(where: str) -> Iterator[None]:
    """Makes a ConfigError of what OmegaConf raises, and of what it lets through."""
    try:
        yield
    except (OmegaConfBaseException, ArithmeticError, AttributeError, TypeError, ValueError) as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{where}: {key}: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def _leaves(values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known and any(k.startswith(f"{key}.") for k in known):
            yield from _leaves(value, known, f"{key}.")
        else:
            yield key


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return cast(dict[str, Any], value)


def read_yaml(path: Path, what: str = "file") -> Mapping[str, Any]:
    """Reads a YAML file of keys; relative paths in it start at its folder.

    Args:
        path: of the file.
        what: begins the errors.

    Raises:
        ConfigError: the file cannot be read, or holds no keys.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} {str(path)!r} cannot be read: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what} {str(path)!r} holds no keys: write `key: value` lines")
    # `definitions` is a place for YAML anchors; they have been put where they are used by now.
    return {key: _anchored(key, value, path.resolve().parent) for key, value in values.items() if key != "definitions"}


def _anchored(key: str, value: Any, folder: Path) -> Any:
    """`value` with its relative paths made absolute: what is named `path` or `root`, and backbones that begin with a dot."""
    if isinstance(value, Mapping):
        return {name: _anchored(name, inner, folder) for name, inner in value.items()}
    if isinstance(value, list):
        return [_anchored(key, inner, folder) for inner in value]
    is_path = key in ("path", "root") or (key == "backbone" and str(value).startswith("."))
    return str(folder / value) if is_path and isinstance(value, str) and value else value


def _near(word: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
