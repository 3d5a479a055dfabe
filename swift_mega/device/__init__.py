"""The device that this process computes on, which optional packages are installed, and patches for Megatron-core without CUDA."""
