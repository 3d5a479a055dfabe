"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads come from one narrow latent.

Megatron's MLASelfAttention builds the linears and norms. The steps from hidden states to queries, keys and values are ours, for two
reasons. Positions are data here, and Megatron's rotation knows only lengths. And the rotated part of the key is one for all heads: every
tensor rank, with some of the heads, has a part of its gradient, and Megatron's local modules keep one rank's part only.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from swift_mega.errors import UserError
from swift_mega.models.edits import Edit, Parts
from swift_mega.models.modules.attention import Segments
from swift_mega.models.modules.layer import NoNorm
from swift_mega.ops.rope import rotate
from swift_mega.parallel.layout import Layout, ModelShape

LINEARS = ("linear_q_proj", "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj")
WITHOUT_EFFECT = ("cache_mla_latents", "apply_rope_fusion")
EPSILON = 1e-6
"""Epsilon of the latents' norms. DeepSeek's and Hugging Face's code use the default of the norm's class, whatever rms_norm_eps says."""


@dataclass(frozen=True, kw_only=True)
class Latent(Edit):
    """Latent attention replaces Megatron's own. Sizes are features: of the latents, and of parts of a head.

    query: of the latent of queries; None: queries have none. latent: of the latent of keys and values. nope_dim,
    rope_dim: of the parts of a query or key that are not rotated, and that are. value: of a value.
    """

    query: int | None
    latent: int
    nope_dim: int
    rope_dim: int
    value: int
    no_memory_formula = "latent attention"

    @property
    def megatron(self) -> dict[str, Any]:
        """The sizes as fields of Megatron's config."""
        return dict(
            multi_latent_attention=True,
            q_lora_rank=self.query,
            kv_lora_rank=self.latent,
            qk_head_dim=self.nope_dim,
            qk_pos_emb_head_dim=self.rope_dim,
            v_head_dim=self.value,
            kv_channels=self.nope_dim + self.rope_dim,
        )

    def edit(self, spec: Any, parts: Parts) -> None:
        """Our module in Megatron's spec. Norms are not fused into the linears, which are all column-parallel.

        In checkpoints the latents' norms have the names of Megatron's layer with Transformer Engine, where they are fused.
        """
        attention = spec.submodules.self_attention
        attention.module = LatentAttention
        submodules = attention.submodules
        submodules.kv_layernorm = _with_epsilon(parts.norm)
        submodules.q_layernorm = NoNorm if self.query is None else submodules.kv_layernorm
        for name in LINEARS:
            setattr(submodules, name, parts.column)
        names = dict(spec.submodules.sharded_state_dict_keys_map)
        del names["input_layernorm."]
        for norm, up in (("q_layernorm", "linear_q_up_proj"), ("kv_layernorm", "linear_kv_up_proj")):
            names[f"self_attention.{norm}."] = f"self_attention.{up}.layer_norm_"
        spec.submodules.sharded_state_dict_keys_map = names

    def limits(self, shape: ModelShape) -> ModelShape:
        return replace(shape, no_te_context="has latent attention, whose values are not as wide as its keys")

    def check_layout(self, layout: Layout) -> None:
        """UserError where the tensor size does not divide the widths of the latents."""
        widths = {
            "q_lora_rank": self.query or layout.tensor,
            "kv_lora_rank + qk_rope_head_dim": self.latent + self.rope_dim,
        }
        for name, width in widths.items():
            if width % layout.tensor:
                raise UserError(
                    f"parallel.tensor={layout.tensor} does not divide {name}={width} of the model's latent attention; "
                    "choose a tensor size that does"
                )

    def attention_linears(self) -> Collection[str]:
        queries = ("linear_q_proj",) if self.query is None else ("linear_q_down_proj", "linear_q_up_proj")
        return *queries, "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj"

    def attention_weights(self, shape: ModelShape) -> int:
        hidden, heads, head_dim = shape.hidden, shape.heads, self.nope_dim + self.rope_dim
        queries = hidden * heads * head_dim if self.query is None else self.query * (hidden + heads * head_dim)
        down = hidden * (self.latent + self.rope_dim)
        return queries + down + self.latent * heads * (self.nope_dim + self.value) + heads * self.value * hidden


class LatentAttention(MLASelfAttention):
    """Megatron's modules, with the row's positions in place of its own rotary embedding."""

    def __init__(self, config: TransformerConfig, submodules: Any, layer_number: int, **given: Any) -> None:
        refuse_without_effect(config)
        super().__init__(config, submodules, layer_number, **given)
        # The rotation moves here from the core attention, which would rotate the first features of whole heads.
        core = self.core_attention
        self.rope_index, self.interleaved, self.kernels = core.rope_index, core.interleaved, core.kernels
        core.rope_index = self.rotary_pos_emb = None

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """The spec's modules, on newer Megatron versions too, which require a norm before a query projection that has no latent."""
        return {name: getattr(submodules, name) for name in (*LINEARS, "q_layernorm", "kv_layernorm")}

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Any = None,
        position_ids: Any = None,
        packed_seq_params: Segments | None = None,
        *args: Any,
        **given: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """hidden_states [tokens / s, 1, hidden] -> query, key [tokens, 1, heads, head_dim], value [tokens, 1, heads, v_head_dim].

        heads: of this tensor rank. The last two results are the latents, for Megatron's inference.
        """
        assert packed_seq_params is not None and self.rope_index is not None
        config, (cos, sin) = self.config, packed_seq_params.rope_tables[self.rope_index]
        nope_dim, rope_dim = config.qk_head_dim, config.qk_pos_emb_head_dim
        query_latent = self._query_latent(hidden_states)
        latent, shared = self._whole(self.linear_kv_down_proj(hidden_states)[0]).split(
            [config.kv_lora_rank, rope_dim], -1
        )
        latent = self.kv_layernorm(self._own_tokens(latent))
        if self._ranks > 1:
            shared = copy_to_tensor_model_parallel_region(shared)  # sums its gradient over the ranks' heads

        query = self._by_head(self._query(query_latent))
        key, value = self._by_head(self.linear_kv_up_proj(latent)[0]).split([nope_dim, config.v_head_dim], -1)
        query, query_rope = query.split([nope_dim, rope_dim], -1)
        shared = rotate(shared, cos, sin, self.interleaved, self.kernels).expand(-1, key.shape[1], -1)
        query = torch.cat((query, rotate(query_rope, cos, sin, self.interleaved, self.kernels)), -1)
        key = torch.cat((key, shared), -1)
        return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), query_latent, latent

    def _query_latent(self, hidden_states: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            return hidden_states
        return self.q_layernorm(self._own_tokens(self._whole(self.linear_q_down_proj(hidden_states)[0])))

    def _query(self, latent: Tensor) -> Tensor:
        linear = self.linear_q_proj if self.config.q_lora_rank is None else self.linear_q_up_proj
        return linear(latent)[0]

    @property
    def _ranks(self) -> int:
        return self.config.tensor_model_parallel_size

    def _whole(self, latent: Tensor) -> Tensor:
        """[tokens, 1, width / ranks] -> [tokens, 1, width] of all tokens."""
        return gather_from_tensor_model_parallel_region(latent) if self._ranks > 1 else latent

    def _own_tokens(self, latent: Tensor) -> Tensor:
        """[tokens, 1, width] -> [tokens / s, 1, width]: this rank's tokens. The linear after it gathers them again."""
        return scatter_to_sequence_parallel_region(latent) if self.config.sequence_parallel else latent

    def _by_head(self, x: Tensor) -> Tensor:
        """[tokens, 1, heads * head_dim] -> [tokens, heads, head_dim]."""
        return x.view(x.shape[0], self.num_attention_heads_per_partition, -1)


def refuse_without_effect(config: TransformerConfig) -> None:
    """UserError for settings of model.megatron that only Megatron's own steps from hidden states to keys read."""
    modules = config.recompute_modules or [] if config.recompute_granularity == "selective" else []
    found = [name for name in WITHOUT_EFFECT if getattr(config, name, False)]
    found += ["recompute_modules=mla_up_proj"] if "mla_up_proj" in modules else []
    if found:
        raise UserError(f"model.megatron.{found[0]}: latent attention cannot use it here; remove it")


def _with_epsilon(norm: Any) -> type:
    """A class, as a spec requires, that builds `norm` with the latents' epsilon. Transformer Engine's is a factory, not a base class."""

    def make(cls: type, config: TransformerConfig, hidden_size: int, **given: Any) -> Any:
        return norm(config=config, hidden_size=hidden_size, eps=EPSILON)

    return type("LatentNorm", (), {"__new__": make})
