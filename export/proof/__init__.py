"""Compare engines with PyTorch float32, and quantised builds with wider ones."""
