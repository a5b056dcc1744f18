"""Fit samplers to a model: settings, block layouts and searched tables."""
