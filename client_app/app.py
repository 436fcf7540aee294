"""The ClientApp of clients that a client spec describes."""

from tap_flower.client.app import spec_client_app

app = spec_client_app()
