"""Where every row of a Megatron parameter comes from, computed one row at a time: the slow oracle of packs and of loading.

Nothing here is shared with swift_mega. There is no reshape and no concatenation of blocks, only loops over heads, features and ranks. They
follow Megatron-core's own description of its fused linears: transformer/attention.py, get_query_key_value_tensors: [group, (queries, key,
value), head_dim]; tensor_parallel/layers.py, ColumnParallelLinear: rank r has the r-th part of the rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Source = tuple[int, int]
"""(index of the Hugging Face tensor in the parameter's list, index of its row or column)."""


def qkv_rows(*, groups: int, queries: int, head_dim: int, tensor: int, rank: int) -> list[Source]:
    """Rows of one rank's linear_qkv. `queries`: query heads per group. Parts: 0 query, 1 key, 2 value.

    With more ranks than groups, a rank has some of the rows of one group.
    """
    rows = []
    for group in range(groups):
        for query in range(queries):
            for feature in range(head_dim):
                rows.append((0, (group * queries + query) * head_dim + feature))
        for part in (1, 2):
            for feature in range(head_dim):
                rows.append((part, group * head_dim + feature))
    return [row for number, row in enumerate(rows) if number // (len(rows) // tensor) == rank]


def gated_qkv_rows(*, groups: int, queries: int, head_dim: int, tensor: int, rank: int) -> list[Source]:
    """As qkv_rows, with a gate for every query. Part 0 has each head's query and then its gate (get_query_key_value_tensors: [group,
    (queries, gates, key, value), head_dim])."""
    rows = []
    for group in range(groups):
        if not rank * groups <= group * tensor < (rank + 1) * groups:
            continue
        for gate in (0, 1):
            for query in range(queries):
                for feature in range(head_dim):
                    rows.append((0, ((group * queries + query) * 2 + gate) * head_dim + feature))
        for part in (1, 2):
            for feature in range(head_dim):
                rows.append((part, group * head_dim + feature))
    return rows


def key_head_rows(*, heads: int, widths: tuple[int, ...], tensor: int, rank: int) -> list[Source]:
    """Rows of one rank's convolution of a gated delta net: for each key head of the rank, the channels of every part."""
    rows = []
    for head in range(heads):
        if rank * heads <= head * tensor < (rank + 1) * heads:
            for part, width in enumerate(widths):
                for channel in range(width):
                    rows.append((part, head * width + channel))
    return rows


def runs(widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(begin, end) of each of several parts that lie one after another."""
    found, end = [], 0
    for width in widths:
        found.append((end, end + width))
        end += width
    return found


def gate_up_rows(*, ffn: int, tensor: int, rank: int) -> list[Source]:
    """Rows of one rank's linear_fc1: its share of gate (0), then its share of up (1)."""
    return [(part, row) for part in (0, 1) for row in range(ffn) if row // (ffn // tensor) == rank]


def even_rows(*, length: int, tensor: int, rank: int) -> list[Source]:
    """Rows (or columns) of one rank where one tensor is sharded evenly."""
    return [(0, row) for row in range(length) if row // (length // tensor) == rank]


def vocabulary_rows(*, vocab: int, unit: int, tensor: int, rank: int) -> list[Source | None]:
    """Rows of one rank's embedding; None is a row of zeros. The whole is padded to a multiple of unit * tensor."""
    padded = vocab
    while padded % (unit * tensor):
        padded += 1
    share = padded // tensor
    return [(0, row) if row < vocab else None for row in range(rank * share, (rank + 1) * share)]


def gather(parts: list[Tensor], sources: list[Source] | list[Source | None], dim: int = 0) -> Tensor:
    """The tensor whose slice i along `dim` is slice sources[i][1] of part sources[i][0]; zeros where sources[i] is None."""
    rows = []
    for source in sources:
        if source is None:
            rows.append(torch.zeros_like(parts[0].select(dim, 0)))
        else:
            rows.append(parts[source[0]].select(dim, source[1]))
    return torch.stack(rows, dim=dim)


# --- a whole parameter of one rank

FFN, EXPERT_FFN = 48, {"qwen3_moe": 24, "mixtral": 48}


@dataclass(frozen=True, kw_only=True)
class Place:
    """The coordinates of a rank in Megatron's parallel state, and the sizes of tests/tiny.py that decide how tensors are sharded."""

    tensor: tuple[int, int]
    expert_tensor: tuple[int, int]
    """(rank, size)."""
    first_expert: int
    groups: int
    queries: int
    head_dim: int
    vocab: int
    vocab_unit: int
    hf_type: str


def parameter(name: str, layer: int | None, hf: Mapping[str, Tensor], place: Place) -> Tensor:
    """The expected value of Megatron's parameter `name` of one chunk on this rank, from whole Hugging Face tensors.

    layer: the global number of its layer, counted from 0; None outside of layers.
    """
    rank, size = place.tensor
    if layer is None:
        source = {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "output_layer.weight": "lm_head.weight",
            "decoder.final_layernorm.weight": "model.norm.weight",
        }[name]
        if name == "decoder.final_layernorm.weight":
            return hf[source]
        # A tied model's head on its last stage has no tensor of its own.
        tensor = hf[source] if source in hf else hf["model.embed_tokens.weight"]
        return gather([tensor], vocabulary_rows(vocab=place.vocab, unit=place.vocab_unit, tensor=size, rank=rank))
    inside = name.split(".", 3)[3]
    prefix = f"model.layers.{layer}."
    if inside.startswith("self_attention."):
        return _attention(inside.removeprefix("self_attention."), prefix + "self_attn.", hf, place)
    if inside.startswith("mlp."):
        return _mlp(inside.removeprefix("mlp."), prefix, hf, place)
    norms = {
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    }
    return hf[prefix + norms[inside]]


def _attention(name: str, prefix: str, hf: Mapping[str, Tensor], place: Place) -> Tensor:
    rank, size = place.tensor
    module, kind = name.split(".")
    if module == "linear_qkv":
        parts = [hf[f"{prefix}{letter}_proj.{kind}"] for letter in "qkv"]
        rows = qkv_rows(groups=place.groups, queries=place.queries, head_dim=place.head_dim, tensor=size, rank=rank)
        return gather(parts, rows)
    if module == "linear_proj":
        whole = hf[f"{prefix}o_proj.{kind}"]
        if kind == "bias":
            return whole
        return gather([whole], even_rows(length=whole.shape[1], tensor=size, rank=rank), dim=1)
    return hf[prefix + {"q_layernorm": "q_norm", "k_layernorm": "k_norm"}[module] + "." + kind]


def _mlp(name: str, prefix: str, hf: Mapping[str, Tensor], place: Place) -> Tensor:
    moe = prefix + ("block_sparse_moe." if place.hf_type == "mixtral" else "mlp.")
    if name == "router.weight":
        return hf[moe + "gate.weight"]
    (rank, size), words, ffn = place.tensor, ("gate_proj", "up_proj", "down_proj"), FFN
    source = prefix + "mlp."
    if name.startswith("experts.local_experts."):
        _, _, expert, name = name.split(".", 3)
        source = f"{moe}experts.{int(expert) + place.first_expert}."
        (rank, size), ffn = place.expert_tensor, EXPERT_FFN[place.hf_type]
        if place.hf_type == "mixtral":
            words = ("w1", "w3", "w2")
    module, kind = name.split(".")
    gate, up, down = (f"{source}{word}.{kind}" for word in words)
    if module == "linear_fc1":
        return gather([hf[gate], hf[up]], gate_up_rows(ffn=ffn, tensor=size, rank=rank))
    if kind == "bias":
        return hf[down]
    return gather([hf[down]], even_rows(length=ffn, tensor=size, rank=rank), dim=1)
