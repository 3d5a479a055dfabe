"""swift_mega: trains Hugging Face checkpoints with Megatron-core in any layout, and writes the results as Hugging Face files.

`LAYERS` is the order of imports, which is also the order in which data passes. A module imports only from its own layer and the ones
before it; tests/test_layers.py fails on any other import.
"""

__version__ = "0.1.0"

LAYERS = (
    "errors", "text_files", "outputs", "discover", "device", "config", "ops", "parallel", "models", "memory", "convert", "tuners",
    "export", "data", "objectives", "train", "verify", "launch", "api", "cli",
)  # fmt: skip
