"""Using the models that a client has trained."""
