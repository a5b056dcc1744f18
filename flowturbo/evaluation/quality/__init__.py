"""Measure the quality of pictures: features, metrics, same-seed error."""
