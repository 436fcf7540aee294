"""Measurements, as ratios within one run."""

import time

from tap_flower.models.allocation import prepare_allocation

BEGAN = time.monotonic()
"""When this process began, nearly: before it imports torch."""

# As in a client; it must come before torch takes memory.
prepare_allocation()
