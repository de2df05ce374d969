"""The prefix cache: KV rows of texts that were read before, in memory and in files."""
