"""The ClientApp of clients that a client spec describes."""

from tap_flower.client.app import app_over
from tap_flower.client.handlers import Handlers


def handlers() -> Handlers:
    """Imported by the first message."""
    from tap_flower.client.evaluation import HANDLERS

    return HANDLERS


app = app_over(handlers)
