"""Hugging Face files: they are read by slices, dequantised while reading, and written in place."""
