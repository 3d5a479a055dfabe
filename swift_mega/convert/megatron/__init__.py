"""Megatron-core's own checkpoints (torch_dist): read, written, and where in them each parameter lies."""
