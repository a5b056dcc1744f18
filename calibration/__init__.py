"""Measures a model to deploy it better. Empty until its own issue; see docs/design.md."""
