"""A bundle compared with its checkpoint."""
