"""Rows of a Megatron checkpoint's vocabulary beyond config.json's vocab_size: are they padding, or tokens that must not be lost?

Megatron pads embedding and output layer to a multiple that its settings give, and a checkpoint does not store the number of real tokens.
Our checkpoints contain the config.json that they were made with. In other checkpoints, rows are known to be padding if they are all equal
(zeros, or copies of one row), or if the settings of the training run (`args`) give exactly this padded size.
"""

from pathlib import Path
from typing import Any

import torch
from megatron.core.safe_globals import SAFE_GLOBALS
from torch import Tensor

from swift_mega.convert.megatron.mcore import COMPANIONS, UNREADABLE, iteration_directory
from swift_mega.convert.megatron.torch_dist import UNREADABLE as UNREADABLE_FILES
from swift_mega.convert.megatron.torch_dist import TorchDist
from swift_mega.errors import UserError
from swift_mega.models.config_json import read_config
from swift_mega.models.settings import padded_vocabulary

PADDED = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")
COMMON = "common.pt"


def check_padding(directory: str | Path, model: str | Path, vocab: int) -> str | None:
    """UserError where rows from `vocab` on may be real tokens; vocab: vocab_size of `model`. Returns a notice on rows left out, or None."""
    recorded = Path(directory) / COMPANIONS
    if (recorded / "config.json").is_file() and recorded.resolve() != Path(model).resolve():
        known = read_config(recorded).get("vocab_size")
        if isinstance(known, int) and known != vocab:
            raise UserError(
                f"{directory} is of a model with vocab_size={known}, and {model}/config.json says vocab_size={vocab}: "
                f"{'rows would be lost' if vocab < known else 'padding would become tokens'}; remove --model, or give one with "
                f"vocab_size={known}"
            )
        return None
    folder = iteration_directory(directory)
    try:
        stored = TorchDist(folder)
        words = _may_be_words(stored, vocab)
    # The code that reads the weights later reports damaged files.
    except UNREADABLE_FILES:
        return None
    return _judge(folder, model, vocab, words) if words else None


def _may_be_words(stored: TorchDist, vocab: int) -> int:
    """The number of rows of the vocabulary if the rows from `vocab` on differ from each other; 0 if they are equal or there are none."""
    rows = {key: value.size[0] for key, value in stored.tensors.items() if key in PADDED}
    odd = [count for key, count in rows.items() if count > vocab and not _alike(_rows(stored, key, vocab))]
    return max(odd, default=0)


def _judge(folder: Path, model: str | Path, vocab: int, count: int) -> str:
    unit = _unit(folder)
    if unit is not None and padded_vocabulary(vocab, unit, 1) == count:
        return (
            f"rows {vocab} to {count - 1} of the vocabulary in {folder} are not written: the run's settings pad it to a multiple of "
            f"{unit}"
        )
    raise UserError(
        f"the vocabulary in {folder} has {count} rows, and {model}/config.json says vocab_size={vocab}: the others differ from each other, "
        f"so they may belong to tokens, and would be lost; give the model that was trained, or set vocab_size={count} to keep them all"
    )


def _rows(stored: TorchDist, key: str, first: int) -> Tensor:
    """The rows of tensor `key` from `first` on."""
    found = stored.tensors[key]
    made = torch.empty((found.size[0] - first, *found.size[1:]), dtype=found.properties.dtype)
    stored.read_into(made, key, [first, *([0] * (made.dim() - 1))], 0)
    return made


def _alike(rows: Tensor) -> bool:
    return bool((rows == rows[:1]).all())


def _unit(folder: Path) -> int | None:
    """The multiple to which a training run of Megatron-LM padded its vocabulary; None where its settings are missing or do not say.

    The settings are a pickle. Only types that Megatron declares as safe are loaded from it.
    """
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            args: Any = torch.load(folder / COMMON, map_location="cpu", weights_only=True).get("args")
    except (*UNREADABLE, AttributeError):
        return None
    by, ranks = (getattr(args, name, None) for name in ("make_vocab_size_divisible_by", "tensor_model_parallel_size"))
    return by * ranks if isinstance(by, int) and isinstance(ranks, int) and by > 0 and ranks > 0 else None
