"""Measure a model to deploy it better: samplers that fit it, and ranges for low precision."""
