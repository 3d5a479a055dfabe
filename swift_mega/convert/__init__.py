"""Hugging Face directories to and from the parameters of a rank: every tensor read once, every parameter filled once."""
