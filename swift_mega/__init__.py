"""swift_mega: Hugging Face checkpoints trained by Megatron-core in any layout, and handed back as Hugging Face files.

`LAYERS` is the walk of the data. A module imports only from its own layer and the ones before it; tests/test_layers.py
fails on any import that points the other way.
"""

__version__ = "0.1.0"

LAYERS = (
    "errors", "text_files", "outputs", "discover", "device", "config", "ops", "parallel", "models", "memory", "convert", "tuners",
    "export", "data", "objectives", "train", "verify", "launch", "api", "cli",
)  # fmt: skip
