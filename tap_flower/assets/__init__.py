"""The demo backbone (folder `flava-demo`) and the script that pretrained it."""
