"""The proof that a bundle decodes as it must."""
