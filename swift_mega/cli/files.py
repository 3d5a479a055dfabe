"""Files of the verbs: checks of outputs that must not be overwritten, and base models of adapters."""

import os
from collections.abc import Sequence
from pathlib import Path

from swift_mega.config.check import check_model_directory
from swift_mega.errors import UserError
from swift_mega.text_files import read_object

# Every directory that swift-mega writes has one of these files; --overwrite must not delete a directory that has none of them.
OURS = ("config.json", "adapter_config.json", "metadata.json", "latest_checkpointed_iteration.txt")


def check_output(path: str, *, overwrite: bool, inputs: Sequence[str]) -> None:
    """Raises UserError where `path` exists and may not be replaced, or contains one of the inputs."""
    output = Path(path).resolve()
    for source in inputs:
        if Path(source).resolve().is_relative_to(output):
            raise UserError(f"--output={path} is where {source} is read from; give another directory")
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"--output={path} is a file; give a directory")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"--output={path} exists and is not empty; give another directory, or --overwrite true")
    if not any((output / name).exists() for name in OURS):
        raise UserError(
            f"--output={path} does not look like a model or checkpoint (none of {', '.join(OURS)} is in it), "
            "so it is not replaced; empty it yourself"
        )


def model_of(adapters: str, model: str | None) -> str:
    """The base model: the given one, else the one named in adapter_config.json. Raises UserError where it does not exist."""
    check_model_directory(adapters, what="--adapters", file="adapter_config.json")
    if model is None:
        config = Path(adapters) / "adapter_config.json"
        model = read_object(config, remedy="copy the file again").get("base_model_name_or_path")
        if not isinstance(model, str) or not model:
            raise UserError(f"{config} names no base model (base_model_name_or_path); give --model DIR")
        check_model_directory(model, what=f"base_model_name_or_path in {config}, since --model is not given,")
    check_model_directory(model, what="--model")
    return model


def check_answers(path: str, *, overwrite: bool, source: str) -> None:
    """Raises UserError where answers cannot be written to `path`; called before a model is loaded."""
    output = Path(path)
    if output.is_dir():
        raise UserError(f"--output={path} is a directory; give a file name in it")
    if output.exists() and not overwrite:
        raise UserError(f"--output={path} exists; give another file, or --overwrite true")
    if output.exists() and source and Path(source).exists() and output.samefile(source):
        raise UserError(f"--output={path} is the file of --input; give another file")
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output={path}: {output.parent} cannot be created: {error.strerror}; give another file"
        ) from None
    if not os.access(output.absolute().parent, os.W_OK):
        raise UserError(f"--output={path}: {output.absolute().parent} cannot be written to; give another file")
