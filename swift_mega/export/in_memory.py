"""A transformers model with an adapter merged in as it is loaded: no copy of the base on disk, none in memory.

transformers takes a checkpoint as named tensors that `[...]` reads, stacks those of experts and renames others. So the adapter is added
before that, under the names of the files, where every factor belongs to one tensor. PEFT adds it afterwards, and drops the factors of
linears that are no modules any more.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift_mega.convert.files.hf_files import some
from swift_mega.convert.files.quantised import open_checkpoint
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.errors import UserError
from swift_mega.export.merged import Merge, read_adapter
from swift_mega.models.quantization import KEYS, quantization_of


def load_merged(
    model: str | Path, adapters: str | Path, config: Any, *, dtype: torch.dtype | None = None, **options: Any
) -> Any:
    """A transformers model of `config`, with the weights of `model` and the adapter in `adapters`.

    dtype: the sum is kept in it. None: it is rounded to the dtype in the files first, which gives what `merge` writes, bit for bit; a
    quantised base is read as plain weights, as `merge` reads it where it is told to. options: of transformers' from_pretrained.
    Raises UserError where a factor is for no linear of the model, or for one that transformers does not load.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

    quantised = quantization_of(model) is not None
    base = open_checkpoint(model, torch.float32 if quantised else None)
    if quantised:
        for key in KEYS:
            if hasattr(config, key):
                delattr(config, key)
    adapter = read_adapter(adapters)
    merge = Merge(base, adapter)
    base, kinds = merge.base, merge.dtypes
    if merge.untied:
        config.tie_word_embeddings = False
    tensors = {name: _Stored(base, name, kinds[name], merge, dtype) for name in base.entries}
    first = next(kind for kind in kinds.values() if kind.is_floating_point)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"transformers has no decoder for {model}/config.json ({type(config).__name__}); merge the adapter first"
        )
    network = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype or getattr(config, "dtype", None) or first, **options
    )
    if lost := sorted(name for name in merge.linears if not tensors[name].read):
        raise UserError(
            f"{adapters} has factors for {some(lost)}, which {type(network).__name__} of transformers does not load; give the "
            "adapter of another model, or train one with other target_modules"
        )
    if (Path(model) / "generation_config.json").is_file():
        network.generation_config = GenerationConfig.from_pretrained(model)
    return network


class _Stored:
    """A tensor in files, merged when it is read: what transformers takes for a safetensors slice."""

    def __init__(
        self, base: TensorSource, name: str, kind: torch.dtype, merge: Merge, dtype: torch.dtype | None
    ) -> None:
        self._base, self._name, self._kind, self._merge, self._dtype = base, name, kind, merge, dtype
        self.read = False

    def __getitem__(self, where: Any) -> Tensor:
        self.read = True
        value = self._base.read(self._name)
        if self._name not in self._merge.linears:
            return value.to(self._kind)[where]
        return self._merge.added(self._name, value, self._dtype or self._kind)[where]

    def get_dtype(self) -> torch.dtype:
        """Of what is read."""
        return self._kind

    def get_shape(self) -> tuple[int, ...]:
        """Of what is read."""
        return self._base.entries[self._name].shape
