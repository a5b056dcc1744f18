"""TensorRT and TensorRT-RTX without ONNX Runtime. No GPU has run this part yet."""
