"""Training: a model in its layout, driven by Megatron's schedule, with what a run writes down about itself."""
