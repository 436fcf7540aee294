"""The demo backbone, in the folder `flava-demo`."""
