"""Starts programs on a person's machine: simulations, nodes, federations in one process."""
