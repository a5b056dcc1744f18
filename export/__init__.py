"""PyTorch to ONNX to engines, and the proof that nothing changed on the way."""
