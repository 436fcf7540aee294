"""Uses the models of a client: predictions, export, a page to try them."""
