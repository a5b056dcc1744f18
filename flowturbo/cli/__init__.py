"""Commands of the science side."""
