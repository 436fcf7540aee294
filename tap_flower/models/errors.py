"""What can be wrong with a backbone; who handles it need not import transformers."""


class BackboneError(ValueError):
    """A backbone cannot be used; the message names it and the remedy."""
