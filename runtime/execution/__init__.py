"""Run plans over engines: loops, buffers, conditioning ahead of time, decoding."""
