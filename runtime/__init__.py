"""Loads an engine directory and makes pictures; free of torch."""

import os

# ONNX Runtime 1.32 reads this when it is imported. Without it, it stores a device id and looks up a host of Microsoft.
# Every part of this project imports this package first, and child processes inherit the environment.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# The Hugging Face client, which diffusers imports, reports how it is used with every download.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
