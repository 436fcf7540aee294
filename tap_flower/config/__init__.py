"""The configuration of a run: its options, and how presets, files and settings are resolved to them."""

from tap_flower.config.options import MOST_ROUNDS as MOST_ROUNDS
from tap_flower.config.options import Admission as Admission
from tap_flower.config.options import Config as Config
from tap_flower.config.options import Encoding as Encoding
from tap_flower.config.options import HyperParameters as HyperParameters
from tap_flower.config.options import Metrics as Metrics
from tap_flower.config.options import Model as Model
from tap_flower.config.options import ReplacementEvidence as ReplacementEvidence
from tap_flower.config.options import ReplacementMode as ReplacementMode
from tap_flower.config.options import ReplacementSource as ReplacementSource
from tap_flower.config.options import StageTwo as StageTwo
from tap_flower.config.options import options as options
from tap_flower.config.resolve import check_contradictions as check_contradictions
from tap_flower.config.resolve import client_specs as client_specs
from tap_flower.config.resolve import hyper_parameters as hyper_parameters
from tap_flower.config.resolve import hyper_parameters_of as hyper_parameters_of
from tap_flower.config.resolve import load_config as load_config
from tap_flower.config.resolve import plain as plain
from tap_flower.config.resolve import presets as presets
from tap_flower.config.resolve import read_yaml as read_yaml
from tap_flower.config.resolve import sent_hyper_parameters as sent_hyper_parameters
from tap_flower.config.resolve import spec_values as spec_values
from tap_flower.config.resolve import to_yaml as to_yaml
from tap_flower.config.run_config import NotedConfig as NotedConfig
from tap_flower.config.run_config import simulated_clients as simulated_clients
from tap_flower.config.run_config import simulated_run as simulated_run
