"""Measurements, as ratios within one run."""

import os

# As in a simulation: large pages for large tensors. It must be set before torch allocates anything.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
