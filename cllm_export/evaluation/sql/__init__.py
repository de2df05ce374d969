"""SQL judged: by execution on generated rows, by its literals, by its parts."""
