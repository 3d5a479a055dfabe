"""What a Hugging Face directory says about the quantisation of its weights.

Today this is `quantization_config` in config.json; older tools wrote a separate file beside it.
"""

from pathlib import Path
from typing import Any

import torch

from swift_mega.errors import UserError
from swift_mega.text_files import read_object

KEYS = ("quantization_config", "compression_config")
"""Fields of config.json; the second is what compressed-tensors wrote at first."""
SIDECARS = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Files that older tools wrote instead, and the method of each where the file names none."""
FLAG = "--dequantize true (model.dequantize=true)"


def quantization_of(directory: str | Path) -> dict[str, Any] | None:
    """The quantisation that a directory states, with its `quant_method`; None where its weights are plain."""
    folder = Path(directory)
    config = _object(folder / "config.json")
    for key in KEYS:
        if config.get(key) is not None:
            return _checked(config[key], f"{folder}/config.json: {key}")
    for name, method in SIDECARS.items():
        if (folder / name).is_file():
            said = _object(folder / name)
            inside = said.get("quantization")  # ModelOpt nests it
            return _checked(
                {"quant_method": method, **(inside if isinstance(inside, dict) else said)}, str(folder / name)
            )
    return None


def stored_dtype(directory: str | Path) -> torch.dtype:
    """The dtype that config.json names for the weights (of a quantised checkpoint: for the dequantised ones); else bfloat16."""
    config = _object(Path(directory) / "config.json")
    name = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return {"float32": torch.float32, "float16": torch.float16}.get(name, torch.bfloat16)


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return read_object(path, remedy="copy it from the original checkpoint again")


def _checked(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("quant_method"), str):
        raise UserError(
            f"{where} is {value!r}, which names no quant_method; copy it from the original checkpoint again"
        )
    return value
