"""Megatron's transformer layer with the connections that families vary: parallel branches, norms after them, a factor on them.

Only the few lines between attention, MLP and residual stream are ours: additions, dropout before them, and which norms and MLPs the
backward pass recomputes. Both modules, and everything that shards them over ranks, stay Megatron's.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel.random import CheckpointWithoutOutput, checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.functional import dropout

from swift_mega.models.settings import Block


class Layer(TransformerLayer):
    """One layer, connected as `block` says. `norm` builds the norms after the branches."""

    def __init__(self, config: TransformerConfig, submodules: Any, *, block: Block, norm: Any, **given: Any) -> None:
        super().__init__(config, submodules, **given)
        self.block = block
        if block.post_norms:
            self.post_self_attn_layernorm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)
            self.post_mlp_layernorm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Any,
        padding_mask: Tensor | None = None,
        **given: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [tokens / s, 1, hidden] -> (the same, None), as TransformerBlock calls a layer."""
        read, forget = self._normed(self.input_layernorm, hidden_states, self.recompute_input_layernorm)
        attended = _output(self.self_attention(read, attention_mask=None, packed_seq_params=packed_seq_params))
        if self.block.post_norms:
            attended = self.post_self_attn_layernorm(attended)
        if self.block.parallel and self.block.shared_norm:
            both = self._dropped(attended) + self._dropped(self._transformed(read, padding_mask))
            forget(both)
            return hidden_states + self._scaled(both), None
        forget(attended)
        if self.block.parallel:
            both = self._dropped(attended) + self._dropped(self._second(hidden_states, padding_mask))
            return hidden_states + self._scaled(both), None
        hidden_states = hidden_states + self._scaled(self._dropped(attended))
        return hidden_states + self._scaled(self._dropped(self._second(hidden_states, padding_mask))), None

    def _second(self, hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The MLP's output, on its own normalised input."""
        read, forget = self._normed(self.pre_mlp_layernorm, hidden_states, self.recompute_pre_mlp_layernorm)
        out = self._transformed(read, padding_mask)
        forget(out)
        return out

    def _transformed(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        def mlp(x: Tensor) -> Tensor:
            # Returns the sum, not the bias beside it. A parameter that a checkpointed function returns gets the checkpoint as its
            # grad_fn, and the backward pass never ends.
            return _output(self.mlp(x, padding_mask=padding_mask))

        out = checkpoint(mlp, False, x) if self.recompute_mlp else mlp(x)
        return self.post_mlp_layernorm(out) if self.block.post_norms else out

    def _normed(self, norm: Any, x: Tensor, recompute: bool) -> tuple[Tensor, Callable[[Tensor], None]]:
        """x normalised, and a function that frees its memory. Call this with a tensor that depends on all uses of the normalised x.

        recompute: that tensor's backward pass recomputes the norm. Else, and for NoNorm (which returns x itself), the function does
        nothing.
        """
        if not recompute or isinstance(norm, NoNorm):
            return norm(x), lambda after: None
        kept = CheckpointWithoutOutput(fp8=self.config.fp8)
        return kept.checkpoint(norm, x), kept.discard_output_and_register_recompute

    def _dropped(self, x: Tensor) -> Tensor:
        return dropout(x, self.hidden_dropout, self.training) if self.hidden_dropout else x

    def _scaled(self, x: Tensor) -> Tensor:
        factor = self.block.residual_multiplier
        return x if factor == 1.0 else x * factor


def _output(result: tuple[Tensor, Tensor | None]) -> Tensor:
    """Output plus bias. Megatron's modules return them apart, for kernels that fuse the sum."""
    out, bias = result
    return out if bias is None else out + bias


class NoNorm(MegatronModule):
    """Takes the place of a norm where a layer has none."""

    def __init__(self, config: TransformerConfig, hidden_size: int, **given: Any) -> None:
        super().__init__(config)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x."""
        return x
