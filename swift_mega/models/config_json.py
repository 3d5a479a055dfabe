"""config.json of a Hugging Face directory."""

import json
from pathlib import Path
from typing import Any

from swift_mega.errors import UserError


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory; UserError where it is missing or not one."""
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise UserError(
            f"model directory {directory} does not exist; give the path of a Hugging Face checkpoint directory"
        )
    if not path.is_file():
        raise UserError(
            f"{directory} has no config.json, so it is not a Hugging Face model; give the directory that holds it"
        )
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy it from the original checkpoint again") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} has no model_type; copy it from the original checkpoint again")
    return config
