"""Regions: parts of a graph that can be left out whole, because what enters fits where they end."""
