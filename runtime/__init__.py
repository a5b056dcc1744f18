"""Loads an engine directory and makes pictures; free of torch."""
