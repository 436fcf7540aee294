"""The ClientApp of clients that a client spec describes."""

from tap_flower.federation.app import app_over
from tap_flower.federation.client import Handlers


def handlers() -> Handlers:
    """Imported by the first message."""
    from tap_flower.federation.spec_client import HANDLERS

    return HANDLERS


app = app_over(handlers)
