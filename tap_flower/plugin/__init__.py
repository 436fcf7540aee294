"""Clients with a model and data of their own: torch only."""
