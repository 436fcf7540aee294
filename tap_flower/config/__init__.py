"""The configuration of a run: its options, and how presets, files and settings are resolved to them."""

from tap_flower.config.options import (
    Config,
    Encoding,
    HyperParameters,
    Metrics,
    Model,
    ReplacementEvidence,
    ReplacementSource,
    StageTwo,
    options,
)
from tap_flower.config.resolve import (
    client_specs,
    hyper_parameters,
    load_config,
    plain,
    presets,
    read_yaml,
    sent_hyper_parameters,
    to_yaml,
)
from tap_flower.config.run_config import simulated_clients, simulated_run

__all__ = [
    "Config",
    "Encoding",
    "HyperParameters",
    "Metrics",
    "Model",
    "ReplacementEvidence",
    "ReplacementSource",
    "StageTwo",
    "client_specs",
    "hyper_parameters",
    "load_config",
    "options",
    "plain",
    "presets",
    "read_yaml",
    "sent_hyper_parameters",
    "simulated_clients",
    "simulated_run",
    "to_yaml",
]
