"""The errors that tap-flower raises on purpose."""


class TapFlowerError(Exception):
    """Base of all errors that tap-flower raises on purpose."""


class ClientError(TapFlowerError, ValueError):
    """A client is not defined as it must be; the message names the client, the thing and the remedy."""


class ConfigError(TapFlowerError, ValueError):
    """An option is wrong; the message names the key, the value and the remedy."""


class PersonalError(TapFlowerError, ValueError):
    """A model cannot be used as it was asked for; the message says what there is, and what to do."""


class SimulationError(TapFlowerError, RuntimeError):
    """A run failed; the message says why, or where the log is."""
