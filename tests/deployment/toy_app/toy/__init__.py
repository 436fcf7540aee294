"""A Flower app for the tests of deployments: it imports torch and Flower, no transformers and no data sets."""
