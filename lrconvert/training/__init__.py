"""Training low-rank networks from the start."""
