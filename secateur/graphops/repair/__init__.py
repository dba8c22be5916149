"""What is left takes over the work of what went: consumers are refitted, layer by layer."""
