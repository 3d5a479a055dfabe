"""How many parameters one rank holds, by formula, from the shapes in the rules of models/decoder.py and the sizes of the mesh axes."""

from collections.abc import Collection
from dataclasses import dataclass

from swift_mega.errors import UserError
from swift_mega.models.settings import Block, Settings, padded_vocabulary
from swift_mega.parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Widths of activations and weights, as features per token on one tensor rank."""

    hidden: int
    query: int
    key: int
    """Features of the keys; the values have as many."""
    heads: int
    ffn: int
    gated: bool
    vocab: int
    rope: int
    """Columns of the cosine tables of all ropes of the model; the sine tables have as many."""
    query_norm: bool
    """Whether queries and keys are normalised."""

    @property
    def first(self) -> int:
        """Outputs of the MLP's first linear: gate and up, or up alone."""
        return 2 * self.ffn if self.gated else self.ffn


def widths(settings: Settings, layout: Layout, vocab_divisible_by: int = 128) -> Widths:
    """The widths of a model; UserError for a model whose layers have no formula yet."""
    shape, megatron = settings.shape, settings.megatron
    _check(settings)
    head_dim, tensor = megatron["kv_channels"], layout.tensor
    return Widths(
        hidden=shape.hidden,
        query=shape.heads // tensor * head_dim,
        key=max(1, shape.kv_heads // tensor) * head_dim,
        heads=shape.heads // tensor,
        ffn=(shape.ffn or 0) // tensor,
        gated=megatron["gated_linear_unit"],
        vocab=padded_vocabulary(shape.vocab, vocab_divisible_by, tensor) // tensor,
        rope=sum(len(rope.inverse_frequencies) for rope in settings.distinct_ropes),
        query_norm=bool(megatron.get("qk_layernorm")) or any(edit.normalises_queries for edit in settings.edits),
    )


def _check(settings: Settings) -> None:
    found = {
        "a mixture of experts": bool(settings.shape.experts),
        **{edit.no_memory_formula: True for edit in settings.edits if edit.no_memory_formula is not None},
        "branches or norms joined in another way than Llama's": settings.block != Block(),
        "a soft-cap in attention": settings.scales.attention_softcap is not None,
    }
    for what, there in found.items():
        if there:
            raise UserError(
                f"the memory formula covers layers like Llama's and Qwen3's, and this model has {what}; measure a small run instead: "
                "logging.jsonl names its memory"
            )


def layer_numbers(settings: Settings, layout: Layout) -> int:
    """Parameters of one decoder layer on one tensor rank."""
    w, tensor = widths(settings, layout), layout.tensor
    # With more tensor ranks than key heads, the weights of the key heads are sharded too, and the keys are gathered.
    kept_keys = settings.shape.kv_heads * settings.megatron["kv_channels"] / tensor
    inputs = round(w.query + 2 * kept_keys)
    norms = 2 * w.hidden * bool(settings.norm.weight) * (2 if settings.norm.bias else 1)
    norms += 2 * settings.megatron["kv_channels"] if settings.megatron.get("qk_layernorm") else 0
    norms += sum(edit.more_parameters(settings.shape, tensor) for edit in settings.edits)
    biases = inputs * bool(settings.megatron.get("add_qkv_bias")) + w.hidden * settings.biases.attention_output
    biases += (w.first + w.hidden) * settings.biases.mlp
    return w.hidden * (inputs + w.query + w.first + w.ffn) + norms + biases


PARTS = ("query", "key", "value", "joined_qkv", "output", "gate", "up", "joined_gate_up", "down")
"""Linears of a layer in a checkpoint. Some families store query, key and value, or gate and up, as one linear."""


def adapter_numbers(settings: Settings, layout: Layout, rank: int, parts: Collection[str] | None = None) -> int:
    """Parameters of LoRA on `parts` of a layer, on one tensor rank (tuners/lora.py). parts None: q, k, v, o, gate, up and down.

    `down` of a linear whose outputs are sharded, and `up` of a linear whose inputs are sharded, are replicated on every tensor rank.
    """
    w = widths(settings, layout)
    sizes = {
        "query": w.hidden + w.query,
        "key": w.hidden + w.key,
        "value": w.hidden + w.key,
        "joined_qkv": w.hidden + w.query + 2 * w.key,
        "output": w.query + w.hidden,
        "gate": w.hidden + w.ffn,
        "up": w.hidden + w.ffn,
        "joined_gate_up": w.hidden + w.first,
        "down": w.ffn + w.hidden,
    }
    if parts is None:
        parts = ("query", "key", "value", "output", *(("gate",) if w.gated else ()), "up", "down")
    return rank * sum(sizes[part] for part in parts)


def stage_numbers(
    settings: Settings, layout: Layout, stage: int, vocab_divisible_by: int = 128
) -> tuple[int, list[int]]:
    """(parameters in the base weights of one rank, layers) of a pipeline stage, over all its chunks."""
    w = widths(settings, layout, vocab_divisible_by)
    layers = [layer for virtual in range(layout.virtual) for layer in layout.layers_of(stage, virtual)]
    total = len(layers) * layer_numbers(settings, layout)
    first, last = stage == 0, stage == layout.pipeline - 1
    table = w.vocab * w.hidden
    total += table * first + (w.hidden * bool(settings.norm.weight)) * last
    total += table * (last and not (settings.tied and layout.pipeline == 1))
    total += (settings.positions or 0) * w.hidden * first
    return total, layers
