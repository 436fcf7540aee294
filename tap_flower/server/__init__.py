"""Runs on the server: the strategy and what it keeps."""
