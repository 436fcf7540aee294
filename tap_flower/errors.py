"""The errors that tap-flower raises on purpose."""


class TapFlowerError(Exception):
    """Base of all errors that tap-flower raises on purpose."""


class ClientError(ValueError):
    """A client is not defined as it must be; the message names the client, the thing and the remedy."""


class SpecError(TapFlowerError, ValueError):
    """A client spec is wrong, or does not fit the data; the message names the client, the key, the value and the remedy."""
