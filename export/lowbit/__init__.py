"""Low precision: ranges, rounding and quantised layers, and which layers stay in 16 or 32 bits."""
