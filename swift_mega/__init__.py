"""swift_mega: Hugging Face checkpoints trained by Megatron-core in any layout, and handed back as Hugging Face files.

`LAYERS = (
    "errors", "text_files", "outputs", "discover", "config", "host_side", "device", "ops", "parallel", "models", "plan", "convert",
    "tuners", "export", "data", "objectives", "train", "launch", "api", "cli",
)  # fmt: skip
