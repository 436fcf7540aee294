"""Measurements, as ratios within one run."""

import time

BEGAN = time.monotonic()
"""When this process began, nearly: before it imports torch."""

from tap_flower.models.cpu import prepare_allocation  # noqa: E402

# As in a client; it must come before torch takes memory.
prepare_allocation()
