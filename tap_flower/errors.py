"""The errors that tap-flower raises on purpose."""


class TapFlowerError(Exception):
    """Base of all errors that tap-flower raises on purpose."""


class ClientError(ValueError):
    """A client is not defined as it must be; the message names the client, the thing and the remedy."""


class BackboneError(TapFlowerError, ValueError):
    """A backbone cannot be used; the message names it and the remedy."""
