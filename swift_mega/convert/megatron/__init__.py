"""Megatron-core's own checkpoints (torch_dist): reading, writing, and where each parameter is stored in them."""
