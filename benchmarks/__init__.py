"""Measurements, as ratios within one run."""

from tap_flower.models.allocation import prepare_allocation

# As in a client; it must come before torch takes memory.
prepare_allocation()
