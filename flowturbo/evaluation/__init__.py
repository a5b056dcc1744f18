"""Measuring what a model makes: distribution metrics, same-seed error, and the table of samplers. Needs no torch."""
