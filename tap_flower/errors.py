"""What can be wrong with a client that brings its own model."""


class ClientError(ValueError):
    """A client is not defined as it must be; the message names the client, the thing and the remedy."""
