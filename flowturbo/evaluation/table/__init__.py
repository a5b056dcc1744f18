"""Compare samplers of one engine directory in a table of quality and latency."""
