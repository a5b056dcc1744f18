"""Training data: photographs in class folders and cached latents."""
