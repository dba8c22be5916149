"""The only room that writes: a plan becomes a new graph, on a clone."""
