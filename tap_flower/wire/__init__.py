"""What server and clients both speak: messages and tensors."""
