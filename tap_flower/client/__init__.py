"""Runs on a node: a client, its tasks, its models and its state."""
