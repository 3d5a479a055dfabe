"""What a user gives `compare` of each checkpoint."""

from dataclasses import dataclass
from typing import Literal

Backend = Literal["mcore", "hf"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One of the two checkpoints, as given by the user.

    checkpoint: a Hugging Face directory or a Megatron checkpoint (torch_dist). model: directory with config and tokenizer of a Megatron
    checkpoint that another program wrote. adapter: a PEFT LoRA directory. backend: "mcore" or "hf"; the default is "mcore",
    or "hf" (transformers) where the model_type is not known. layout: of Megatron-core, written as for `verify`.
    """

    checkpoint: str
    model: str | None = None
    adapter: str | None = None
    backend: Backend | None = None
    layout: str | None = None
