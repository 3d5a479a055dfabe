"""A transformers model into which an adapter is merged while loading, without a copy of the base on disk or in memory.

transformers accepts a checkpoint as named tensors that it reads by `[...]`; it then stacks experts and renames other tensors. The adapter
is added before that, under the names in the files, where each pair of factors belongs to one tensor. PEFT adds it after loading, and so
drops the factors of linears that are no longer modules.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift_mega.convert.files.hf_files import some
from swift_mega.convert.files.quantised import open_checkpoint
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.errors import UserError
from swift_mega.export.merged import merged_of
from swift_mega.models.quantization import KEYS, quantization_of
from swift_mega.tuners.merged import Merged


def load_merged(
    model: str | Path, adapters: str | Path, config: Any, *, dtype: torch.dtype | None = None, **options: Any
) -> Any:
    """A transformers model of `config`, with the weights of `model` and the adapter in `adapters` merged in.

    dtype: the dtype of the merged weights. None: the dtype in the files, which gives bit for bit what `merge` writes.
    A quantised base is read as plain weights, as `merge` does with dequantize=True. options: passed to transformers' from_pretrained.
    Raises UserError where a factor belongs to no linear of the model, or to one that transformers does not load.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

    quantised = quantization_of(model) is not None
    base = open_checkpoint(model, torch.float32 if quantised else None)
    if quantised:
        for key in KEYS:
            if hasattr(config, key):
                delattr(config, key)
    merge = merged_of(base, adapters)
    base, kinds = merge.base, merge.dtypes
    for key, value in merge.config_edits.items():
        setattr(config, key, value)
    tensors = {name: _Stored(base, name, kinds[name], merge, dtype) for name in base.entries}
    first = next(kind for kind in kinds.values() if kind.is_floating_point)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"transformers has no decoder for {model}/config.json ({type(config).__name__}); merge the adapter first"
        )
    network = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype or getattr(config, "dtype", None) or first, **options
    )
    if lost := sorted(name for name in merge.changed if not tensors[name].read):
        raise UserError(
            f"{adapters} has factors for {some(lost)}, which {type(network).__name__} of transformers does not load; give the "
            "adapter of another model, or train one with other target_modules"
        )
    if (Path(model) / "generation_config.json").is_file():
        network.generation_config = GenerationConfig.from_pretrained(model)
    return network


class _Stored:
    """A tensor in files that is merged when it is read. transformers uses it like a safetensors slice."""

    def __init__(
        self, base: TensorSource, name: str, kind: torch.dtype, merge: Merged, dtype: torch.dtype | None
    ) -> None:
        self._base, self._name, self._kind, self._merge, self._dtype = base, name, kind, merge, dtype
        self.read = False

    def __getitem__(self, where: Any) -> Tensor:
        self.read = True
        value = self._base.read(self._name)
        if self._name not in self._merge.changed:
            return value.to(self._kind)[where]
        return self._merge.merged(self._name, value, self._dtype or self._kind)[where]

    def get_dtype(self) -> torch.dtype:
        """Dtype of the tensor."""
        return self._kind

    def get_shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self._base.entries[self._name].shape
