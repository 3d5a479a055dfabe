"""transformers' side of a comparison: the model, optionally with an adapter, and its modules for hidden states and logits."""

from pathlib import Path
from typing import Any

import torch

from swift_mega.convert.files.hf_files import some
from swift_mega.convert.source import Source
from swift_mega.errors import UserError
from swift_mega.export.in_memory import load_merged
from swift_mega.models.translate import hf_config
from swift_mega.tuners.lora_files import read_adapter


def network_of(model: Path, adapter: Path | None, dtype: torch.dtype) -> Any:
    """A transformers model of any type that transformers knows, optionally with an adapter, ready for a forward pass.

    The adapter is loaded by PEFT where PEFT loads all of it. For model types with experts it is merged into the weights while they are
    loaded: transformers stacks experts, and PEFT joins their factors into one or drops them. It is also merged for model types that are
    not known here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = Source(model)
    known = source.is_known
    config = hf_config(model) if known else AutoConfig.from_pretrained(model, trust_remote_code=False)
    # transformers' grouped GEMM of experts does not support float64; its loop over experts does.
    loop = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    if adapter is not None and (not known or any("{e}" in rule.megatron for rule in source.family.rules)):
        return load_merged(model, adapter, config, dtype=dtype, **loop).eval()
    network: Any = AutoModelForCausalLM.from_pretrained(
        model, config=config, dtype=dtype, trust_remote_code=False, **loop
    )
    if adapter is not None:
        network = _with_peft(network, adapter).to(dtype)
    return network.eval()


def peft_config(adapter: Path) -> Any:
    """PEFT's config of an adapter. Where the file has no targets, tensor names give them; PEFT would guess them by the model's type."""
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(adapter))
    if config.target_modules is None:
        config.target_modules = set(read_adapter(adapter).modules)
    return config


def _with_peft(network: Any, adapter: Path) -> Any:
    """PEFT's model; UserError where PEFT does not load all factors. PEFT itself only warns, or ignores them silently."""
    from peft import PeftModel

    network = PeftModel.from_pretrained(network, str(adapter), is_trainable=True, config=peft_config(adapter))
    taken = {name.replace(".default.", ".") for name, _ in network.named_parameters() if ".lora_" in name}
    if lost := sorted(read_adapter(adapter).checkpoint.entries.keys() - taken):
        raise UserError(
            f"PEFT does not apply all of {adapter}: it does not load {some(lost)}; merge the adapter first (swift-mega export "
            "--merge_lora true)"
        )
    return network


def is_peft(network: Any) -> bool:
    """Whether a model of `network_of` has its adapter as PEFT modules, not merged."""
    return hasattr(network, "peft_config")


def decoder_layers(network: Any, count: int, *, where: Path) -> torch.nn.ModuleList:
    """The decoder layers of a transformers model: its outermost ModuleList with `count` modules."""
    for _, module in network.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise UserError(
        f"{where}: {type(network).__name__} has no list of {count} decoder layers (num_hidden_layers), so its layers cannot be "
        "told apart; compare a decoder-only model"
    )


def head_of(network: Any, *, where: Path) -> torch.nn.Module:
    """The module that computes logits from the final norm's output. Scaling of logits comes after it."""
    head = network.get_output_embeddings()
    if head is None:
        raise UserError(
            f"{where}: {type(network).__name__} has no output layer, and so no logits; compare a language model"
        )
    return head
