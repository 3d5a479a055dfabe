"""Training: a model in its layout, Megatron's schedule and optimizer, and the logs and checkpoints of a run."""
