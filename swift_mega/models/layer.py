"""Megatron's transformer layer with the joints that families vary: parallel branches, norms after them, a factor on them.

Only the few lines between attention, MLP and residual stream are ours; both modules, and everything that cuts them over ranks,
stay Megatron's.
"""

from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from swift_mega.models.settings import Block


class Layer(TransformerLayer):
    """One layer, joined as `block` says. `norm` builds the norms after the branches."""

    def __init__(self, config: TransformerConfig, submodules: Any, *, block: Block, norm: Any, **given: Any) -> None:
        super().__init__(config, submodules, **given)
        self.block = block
        if block.post_norms:
            self.post_self_attn_layernorm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)
            self.post_mlp_layernorm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, packed_seq_params: Any,
        padding_mask: Tensor | None = None, **given: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """hidden_states [tokens / s, 1, hidden] -> (the same, None), as TransformerBlock calls a layer."""
        read = self.input_layernorm(hidden_states)
        attended = _output(self.self_attention(read, attention_mask=None, packed_seq_params=packed_seq_params))
        if self.block.post_norms:
            attended = self.post_self_attn_layernorm(attended)
        if self.block.parallel:
            again = read if self.block.shared_norm else self.pre_mlp_layernorm(hidden_states)
            return hidden_states + self._scaled(attended + self._transformed(again, padding_mask)), None
        hidden_states = hidden_states + self._scaled(attended)
        return hidden_states + self._scaled(
            self._transformed(self.pre_mlp_layernorm(hidden_states), padding_mask)
        ), None

    def _transformed(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        out = _output(self.mlp(x, padding_mask=padding_mask))
        return self.post_mlp_layernorm(out) if self.block.post_norms else out

    def _scaled(self, x: Tensor) -> Tensor:
        factor = self.block.residual_multiplier
        return x if factor == 1.0 else x * factor


def _output(result: tuple[Tensor, Tensor | None]) -> Tensor:
    """Megatron's modules return output and bias apart, for kernels that fuse the sum."""
    out, bias = result
    return out if bias is None else out + bias


class NoNorm(MegatronModule):
    """Stands where a layer has no norm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, **given: Any) -> None:
        super().__init__(config)

    def forward(self, x: Tensor) -> Tensor:
        """x."""
        return x
