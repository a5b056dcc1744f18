"""Measure the ranges of layers, and what each layer costs in low precision."""
