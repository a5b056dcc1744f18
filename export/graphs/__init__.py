"""What is traced to ONNX: the engine contract in PyTorch, and the checks of its files."""
