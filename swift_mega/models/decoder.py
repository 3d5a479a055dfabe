"""The common pre-norm decoder as data: the settings of Megatron that its config gives. models/rules.py says which tensors fill it.

A family file is a diff from `translate` and the rules; it does not know which modules Megatron builds (models/specs.py does).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from swift_mega.errors import UserError
from swift_mega.models.family import Family
from swift_mega.models.packs import Heads
from swift_mega.models.rules import RULES
from swift_mega.models.settings import Rope, Routing, Settings
from swift_mega.parallel.layout import ModelShape

READS = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim rms_norm_eps "
    "max_position_embeddings tie_word_embeddings rope_theta rope_scaling rope_parameters sliding_window layer_types".split()
)


def translate(
    config: Any,
    *,
    epsilon: str | float = "rms_norm_eps",
    ffn: int | None = None,
    kv_heads: int | None = None,
    **changes: Any,
) -> Settings:
    """Settings of a Llama-like config. `changes` are fields of Settings; `megatron` is merged into the fields found here.

    epsilon: name of the config's field for the norms' epsilon, or its value where there is no field. ffn, kv_heads: width of the MLP and
    number of key heads, where they are not `intermediate_size` and `num_key_value_heads`.
    """
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kv_heads = kv_heads or getattr(config, "num_key_value_heads", None) or heads
    ffn = ffn or config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    megatron: dict[str, Any] = dict(
        num_layers=layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        kv_channels=head_dim,
        layernorm_epsilon=getattr(config, epsilon) if isinstance(epsilon, str) else epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    shape = ModelShape(
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        experts=None,
        hidden=config.hidden_size,
        ffn=ffn,
        expert_ffn=None,
        vocab=config.vocab_size,
        head_dim=head_dim,
        alone_in_a_row="adds biases to scores by position (ALiBi), which is not supported over context ranks"
        if changes.get("alibi")
        else None,
        key_heads_alone="has its own norm, which cannot be split over tensor ranks"
        if changes.get("head_qk_norm")
        else None,
    )
    found: dict[str, Any] = dict(
        shape=shape,
        heads=Heads(heads // kv_heads, head_dim, kv_heads),
        tied=bool(config.tie_word_embeddings),
        ropes=changes.pop("ropes", None) or (rope(config, head_dim),) * layers,
        windows=(None,) * layers,
        moe_layers=(False,) * layers,
    )
    megatron.update(changes.pop("megatron", {}))
    if "biases" in changes:
        megatron["add_bias_linear"] = changes["biases"].mlp
    if "norm" in changes:
        megatron["normalization"] = "RMSNorm" if changes["norm"].kind == "rms" else "LayerNorm"
    found.update(changes)
    return Settings(megatron=megatron, **found)


def moe(
    settings: Settings,
    *,
    experts: int,
    top_k: int,
    ffn: int,
    layers: tuple[bool, ...],
    normalise: bool = True,
    shared: int | None = None,
    shared_gate: bool = False,
    routing: Routing | None = None,
) -> Settings:
    """Settings with a mixture of experts in the marked layers, routed by softmax where there is no `routing`.

    normalise: the weights of the chosen experts sum to one, which Megatron computes by taking the softmax after the choice.
    shared: width of the shared expert, which every token passes; shared_gate: the sigmoid of a learned projection multiplies its output.
    """
    megatron = dict(
        num_moe_experts=experts,
        moe_router_topk=top_k,
        moe_ffn_hidden_size=ffn,
        moe_router_pre_softmax=not normalise,
        moe_layer_freq=[int(moe) for moe in layers],
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_router_dtype="fp32",
    )
    if shared:
        megatron.update(moe_shared_expert_intermediate_size=shared, moe_shared_expert_gate=shared_gate)
    if routing is not None:
        megatron.update(moe_router_score_function=routing.score, moe_router_pre_softmax=True)
    return dataclasses.replace(
        settings,
        megatron={**settings.megatron, **megatron},
        moe_layers=layers,
        routing=routing,
        shape=dataclasses.replace(settings.shape, experts=experts, expert_ffn=ffn, shared_ffn=shared or None),
    )


def whole_heads(config: Any) -> None:
    """UserError where config.json has another head_dim than hidden_size / num_attention_heads, and the family has only this one."""
    named, real = getattr(config, "head_dim", None), config.hidden_size // config.num_attention_heads
    if named not in (None, real):
        raise UserError(
            f"config.json: head_dim={named}, but hidden_size / num_attention_heads is {real}; delete head_dim"
        )


def windows(config: Any) -> tuple[int | None, ...]:
    """Sliding windows per layer: by `layer_types`, or `sliding_window` for all layers where config.json has no such list."""
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    known = {"sliding_attention", "full_attention"}
    if strange := set(types) - known:
        raise UserError(f"config.json: layer_types has {sorted(strange)}; supported: {sorted(known)}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def rope(config: Any, head_dim: int, *, interleaved: bool = False, layer_type: str | None = None) -> Rope:
    """Rotary frequencies of a transformers config; scaled kinds are computed by transformers' own functions.

    layer_type: which frequencies, in a config that has some for each type of layer. UserError where a parameter has a type that the
    formulas do not take; transformers only warns of that.
    """
    parameters = config.rope_parameters
    try:
        parameters = dict(parameters if layer_type is None else parameters[layer_type])
        return _rope(config, parameters, head_dim, interleaved, layer_type)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"config.json: rope parameters {parameters!r} give no frequencies ({error}); correct them"
        ) from None


def _rope(config: Any, parameters: Mapping[str, Any], head_dim: int, interleaved: bool, layer_type: str | None) -> Rope:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = parameters.get("rope_type", "default")
    if kind in ("default", "dynamic"):
        # transformers scales `dynamic` frequencies only for inputs longer than the trained length, by the longest of a batch.
        # Examples of many lengths in a packed row have no common frequency, so longer examples are refused instead (`longest`).
        rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float) / rotary_dim
        frequencies = 1.0 / (parameters["rope_theta"] ** exponents)
        longest = config.max_position_embeddings if kind == "dynamic" else None
        return Rope(tuple(frequencies.tolist()), longest=longest, interleaved=interleaved)
    if kind not in ("linear", "llama3", "yarn", "longrope"):
        raise UserError(
            f"config.json: rope_type {kind!r} is not supported; supported: default, linear, dynamic, llama3, yarn, longrope"
        )
    made, given = ROPE_INIT_FUNCTIONS[kind], {} if layer_type is None else {"layer_type": layer_type}
    frequencies, scale = made(config, torch.device("cpu"), **given)
    rope = Rope(tuple(frequencies.tolist()), scale=float(scale), interleaved=interleaved)
    if kind != "longrope":
        return rope
    if scales := sorted({"short_mscale", "long_mscale"} & parameters.keys()):
        raise UserError(f"config.json: {scales[0]} of rope_type longrope is not supported, and transformers ignores it")
    beyond = parameters["original_max_position_embeddings"]
    long, _ = made(config, torch.device("cpu"), seq_len=beyond + 1, **given)
    return dataclasses.replace(rope, long=tuple(long.tolist()), long_beyond=beyond)


def ropes_by_type(config: Any, head_dim: int, *, interleaved: bool = False) -> tuple[Rope, ...]:
    """Per layer: the rotation of its layer type."""
    made = {kind: rope(config, head_dim, interleaved=interleaved, layer_type=kind) for kind in set(config.layer_types)}
    return tuple(made[kind] for kind in config.layer_types)


def vary(base: Family, **changes: Any) -> Family:
    """`base` with other fields; given `rules`, `reads` and `fixed` are added to the base's."""
    changes["rules"] = base.rules + tuple(changes.get("rules", ()))
    changes["reads"] = base.reads | frozenset(changes.get("reads", ()))
    changes["fixed"] = {**base.fixed, **changes.get("fixed", {})}
    return dataclasses.replace(base, **changes)


DECODER = Family(
    hf_types=(),
    translate=translate,
    rules=RULES,
    reads=READS,
    absent=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
