"""Methods of personalised federated learning, over the core's one training loop."""
