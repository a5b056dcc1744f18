"""Measurements and stress tests that are run by hand: `python -m benchmarks.NAME --help`."""
