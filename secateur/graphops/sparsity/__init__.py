"""Takes single weights out of what the cut has left: their entries become zero."""
