"""TAP (Two-Stage Adaptive Personalization, arXiv 2509.26524) for federated learning with Flower."""

__version__ = "0.1.0"
