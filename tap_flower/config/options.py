"""The options of a run as dataclasses: every option with its default, its bounds and its help text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from tap_flower.config.baselines import Baselines
from tap_flower.config.declare import collection, option
from tap_flower.core.training import Optimisation

MOST_ROUNDS = 1_000_000
"""Rounds of stage 1; a message of a later one is refused."""


class ReplacementSource(Enum):
    """The weights that a replacement copies."""

    trained = "trained"
    received = "received"


class ReplacementEvidence(Enum):
    """The losses that a replacement is decided on."""

    validation = "validation"
    training = "training"


class ReplacementMode(Enum):
    """How a replacement changes a pair's components."""

    hard = "hard"
    mix = "mix"


class StageTwo(Enum):
    """What TAP's stage 2 does with the personal model."""

    distillation = "distillation"
    finetuning = "finetuning"
    finetuning_twice = "finetuning_twice"


class Encoding(Enum):
    """The number format of tensors in messages."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


class Precision(Enum):
    """The number format that models compute in; their trainable tensors are float32 in both."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class Margins:
    """The margin by which the server's copy must be better before it replaces, by kind of task."""

    image_classification: float = option(0.01, "margin, in units of the cross-entropy", 0.0, 1e6)
    text_generation: float = option(0.01, "margin, in units of the cross-entropy of a token", 0.0, 1e6)
    text_classification: float = option(0.005, "margin, in units of the cross-entropy", 0.0, 1e6)
    image_generation: float = option(0.005, "margin, in units of the squared error", 0.0, 1e6)


@dataclass
class DistillationWeights:
    """Weight w of the distillation loss beside the task's own, by kind of task."""

    image_classification: float = option(2e-3, "weight w of the distillation loss", 0.0, 1e6)
    text_generation: float = option(2e-3, "weight w of the distillation loss", 0.0, 1e6)
    text_classification: float = option(1.0, "weight w of the distillation loss", 0.0, 1e6)
    image_generation: float = option(2e-3, "weight w of the distillation loss", 0.0, 1e6)


@dataclass
class Model:
    """The shape of the model, which all clients of a run share."""

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
    """How clients compute; beyond the precision, no result depends on it but in its last bits."""

    precision: Precision = option(
        Precision.float32,
        "bfloat16: frozen weights and activations, where the processor multiplies it; the rest is float32",
    )
    recompute: bool = option(
        False,
        "gradient checkpointing: compute the inside of each layer again in the backward pass; less memory, more time",
    )
    deterministic: bool = option(
        False,
        "torch.use_deterministic_algorithms: one seed, one result on a GPU too; slower, and not for all operations",
    )


@dataclass
class SimulationCompute(Compute):
    """How the clients of a simulation compute; a deployed node decides the rest itself, and no result depends on it."""

    compile: bool = option(
        False,
        "torch.compile: takes minutes at first, in each process, and a C++ compiler; never sent: a deployed node has its "
        "own setting",
    )
    loader_workers: int | None = option(
        None,
        "threads of each client that read data ahead of training; null: 4 with a GPU, else 0; never sent, as `compile`",
        0,
        64,
    )


@dataclass
class Train:
    """Local training in a round, of the server's copy and of the personal model alike."""

    steps: int = option(20, "optimiser steps of one participation, R", 1, 100_000)
    batch_size: int = option(32, "examples in a batch", 1, 65_536)
    accumulation: int = option(4, "batches per optimiser step", 1, 1024)
    group_by_length: bool = option(
        False,
        "batch texts of about the same length: less padding, but less mixed batches where the length tells the label",
    )
    learning_rate: float = option(3e-4, "peak learning rate of AdamW", 0.0, 0.1)
    head_factor: float = option(1.0, "learning rate of the heads, as a multiple of the others'", 0.0, 100.0)
    start_learning_rate: float | None = option(
        None,
        "learning rate of the first round, which rises linearly to the peak; null: the peak from the first",
        0.0,
        0.1,
    )
    warmup_rounds: int = option(20, "rounds from the first to the one at the peak", 1, 100_000)
    weight_decay: float = option(0.01, "weight decay of AdamW", 0.0, 0.5)
    clip_norm: float = option(1.0, "largest L2 norm of the gradient", 1e-6, 1e6)
    personal_from: int = option(
        1,
        "of method tap: first round in which clients train their personal models; before it, these change by replacement "
        "alone",
        1,
        MOST_ROUNDS,
    )

    def optimisation(self, server_round: int) -> Optimisation:
        """The optimisation of one participation in `server_round` (counted from 1): the learning rate warms up linearly."""
        start = self.learning_rate if self.start_learning_rate is None else self.start_learning_rate
        learning_rate = start + (self.learning_rate - start) * min((server_round - 1) / self.warmup_rounds, 1.0)
        return Optimisation(self.steps, learning_rate, self.weight_decay, self.accumulation, self.clip_norm)


@dataclass
class Distill:
    """Stage 2: fine-tuning, and distillation into the personal model."""

    iterations: int = option(50, "optimiser steps K of the fine-tuning, and again of the distillation", 1, 100_000)
    learning_rate: float = option(1e-4, "learning rate of AdamW in stage 2", 0.0, 0.1)
    temperature: float = option(1.0, "temperature T of the softened outputs", 0.01, 100.0)
    stage: StageTwo = option(
        StageTwo.distillation,
        "of method tap: distillation from the fine-tuned server copy; finetuning for K steps, without a teacher; "
        "finetuning_twice for 2K, the teacher's among them",
    )
    only_better: bool = option(
        False,
        "true: distil only for the pairs whose teacher has the lower loss of held-out examples as the student begins",
    )
    weight: DistillationWeights = field(default_factory=DistillationWeights)

    def optimisation(self, train: Train) -> Optimisation:
        """The optimisation of stage 2; all but steps and learning rate are as in `train`."""
        return Optimisation(
            self.iterations, self.learning_rate, train.weight_decay, train.accumulation, train.clip_norm
        )


@dataclass
class Replacement:
    """The adaptive replacement of stage 1."""

    enabled: bool = option(True, "false: the ablation without replacement")
    source: ReplacementSource = option(
        ReplacementSource.trained,
        "trained: copy the locally trained weights; received: copy the weights as they came from the server",
    )
    evidence: ReplacementEvidence = option(
        ReplacementEvidence.validation,
        "validation: compare losses of held-out local examples; training: compare the training losses (source=trained only)",
    )
    mode: ReplacementMode = option(
        ReplacementMode.hard,
        "hard: the server's weights or the personal ones; mix: personal + α (server - personal), α = 0, ¼, ½, ¾ or 1 by the "
        "loss of held-out examples",
    )
    before_stage_two: bool = option(False, "true: decide once more at the start of stage 2, on held-out examples")
    after_stage_two: bool = option(
        False, "true: decide once more at the end of stage 2 on the server's model as received, on held-out examples"
    )
    margin: Margins = field(default_factory=Margins)


@dataclass
class Wire:
    """Messages between the server and the clients, in both directions."""

    encoding: Encoding = option(
        Encoding.float32, "of tensors: float32 as they are; bfloat16 half the bytes; int8 a quarter, with scales"
    )


@dataclass
class Metrics:
    """Metrics that need the extra `text-metrics` and files of their own; a deployed node has these in its own settings."""

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
    """Differential privacy of clients towards each other; docs/privacy.md says what it covers."""

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
class Admission:
    """Who may take part in a run, and how much all of them may bring, those that have gone included."""

    clients: list[str] = collection(list, "names of the clients that may take part; empty: any")
    fingerprint: str = option("", "of the backbone that every client must have; empty: that of the first to come")
    most_clients: int = option(10_000, "most clients", 1, 1_000_000)
    most_tensors: int = option(20_000, "most tensors that clients exchange", 1, 10_000_000)
    most_gigabytes: float = option(8.0, "most memory of these tensors' values, 10⁹ bytes", 0.001, 1e4)


@dataclass
class Stopping:
    """Early stopping by the mean validation score of the clients' own models."""

    patience: int = option(
        0, "rounds without improvement after which stage 1 ends and the best round counts; 0 disables", 0, 1_000_000
    )


@dataclass
class HyperParameters:
    """The options that the server sends to the clients; it can set nothing else on them."""

    method: str = option("tap", "name of the method: tap, or one that it is compared with")
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
    """The configuration of a run: the clients' hyper-parameters, the server's options, a simulation's clients."""

    compute: SimulationCompute = field(default_factory=SimulationCompute)
    preset: str = option("demo", "name of the preset that this configuration came from")
    rounds: int = option(200, "rounds of stage 1", 1, MOST_ROUNDS)
    clients_per_round: int = option(2, "clients that are sampled in a round", 1, 1_000_000)
    round_timeout: float = option(
        3600.0, "seconds without an answer until the clients that are still silent are left out", 1.0, 1e7
    )
    start_timeout: float = option(120.0, "seconds to wait for the clients before the first round", 1.0, 1e7)
    min_replies: int = option(1, "fewest replies of a phase that can be used; with fewer the run fails", 1, 1_000_000)
    require_state: bool = option(False, "whether the run fails where a client has lost its state of this run")
    trackers: str = option("", "experiment trackers, separated by commas: tensorboard, mlflow, wandb")
    admission: Admission = field(default_factory=Admission)
    aggregation: Aggregation = field(default_factory=Aggregation)
    privacy: Privacy = field(default_factory=Privacy)
    data: Data = field(default_factory=Data)
    metrics: Metrics = field(default_factory=Metrics)
    backbone: str = option(
        "demo", "of the clients that name none: demo, a local folder (absolute, or ./...) or a hub id"
    )
    backbone_revision: str | None = option(None, "commit, tag or branch of `backbone` on the hub")
    clients: list[Any] = collection(
        list, "the client specs of a simulation; where none are given, `patterns` make them"
    )
    patterns: list[Any] = collection(list, "clients that every group has, as in the presets")
    groups: int = option(1, "groups that share the rows of `datasets`; each has all `patterns`", 1, 100_000)
    datasets: dict[str, Any] = collection(
        dict, "the data sets that `patterns` name: name, format, config, revision, rows to share"
    )


def options(schema: type[Any] = Config, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Lists the options of a configuration dataclass.

    Yields:
        (key, default, metadata) of every option: nested keys have dots, the metadata are help text and bounds.
    """
    instance = schema()
    for f in fields(schema):
        value = getattr(instance, f.name)
        if is_dataclass(value):
            yield from options(type(value), f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value, f.metadata
