"""Hugging Face files: read by slices, dequantised as they are read, written in place."""
