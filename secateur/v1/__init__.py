"""Stubs of the wire contract, generated from `protos/` by `scripts/generate_stubs.py`: do not edit.

Programs that speak to a server in Python want `secateur.Client`, which hides all of this.
"""
