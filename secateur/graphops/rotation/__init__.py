"""Streams of channels, and the basis in which fewest of them are needed."""
