"""The device that this process computes on, what is installed beside torch, and Megatron-core where there is no CUDA."""
