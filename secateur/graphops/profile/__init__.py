"""What a model costs before and after, measured alternately on the same machine."""
