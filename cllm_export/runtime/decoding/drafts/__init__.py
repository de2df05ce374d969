"""What may stand in a block as a guess."""
