"""config.json of a Hugging Face directory."""

from pathlib import Path
from typing import Any

from swift_mega.errors import UserError
from swift_mega.text_files import read_object


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory; UserError where it is missing or has no model_type."""
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise UserError(
            f"model directory {directory} does not exist; give the path of a Hugging Face checkpoint directory"
        )
    if not path.is_file():
        raise UserError(
            f"{directory} has no config.json, so it is not a Hugging Face model; give the directory that has it"
        )
    config = read_object(path, remedy="copy it from the original checkpoint again")
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} has no model_type; copy it from the original checkpoint again")
    return config
