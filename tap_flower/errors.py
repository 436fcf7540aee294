"""The errors that tap-flower raises on purpose. A message names the thing, the value and the remedy."""


class TapFlowerError(Exception):
    """Base of all errors that tap-flower raises on purpose."""


class BackboneError(TapFlowerError, ValueError):
    """A backbone cannot be found or used."""


class ClientError(TapFlowerError, ValueError):
    """A client is not defined as it must be: its model, its tasks or its data do not fit together."""


class ConfigError(TapFlowerError, ValueError):
    """A configuration, or a setting, is wrong."""


class DivergedError(TapFlowerError, RuntimeError):
    """Training produced a loss that is not finite."""


class MessageError(TapFlowerError, ValueError):
    """What a peer sent cannot be used: a field, a tensor or a client does not fit the protocol or the federation."""


class PersonalError(TapFlowerError, ValueError):
    """A model cannot be used as it was asked for."""


class RunError(TapFlowerError, RuntimeError):
    """A run cannot start or go on."""


class SimulationError(TapFlowerError, RuntimeError):
    """A simulation failed."""


class SpecError(TapFlowerError, ValueError):
    """A client spec is wrong, or does not fit its data."""


class StorageError(TapFlowerError, RuntimeError):
    """A file cannot be read or written, or its content is damaged."""
