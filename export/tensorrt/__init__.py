"""Compile ONNX files with TensorRT or TensorRT-RTX, in a process of its own."""
