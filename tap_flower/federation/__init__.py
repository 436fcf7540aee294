"""TAP over Flower: messages, the clients' handlers, the server's strategy."""
