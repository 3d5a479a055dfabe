"""Conversion between Hugging Face directories and a rank's parameters: every tensor is read once, every parameter is filled once."""
