"""Where every row of a Megatron parameter comes from, counted out one row at a time: the slow oracle of packs and of loading.

Nothing here is shared with swift_mega: no reshape, no concatenation of blocks, just loops over heads, features and ranks, after
Megatron-core's own description of its fused linears (transformer/attention.py, get_query_key_value_tensors: [group, (queries, key,
value), head_dim]; tensor_parallel/layers.py, ColumnParallelLinear: rank r has the r-th part of the rows).
"""

import torch
from torch import Tensor

Source = tuple[int, int]
"""Which Hugging Face tensor of a parameter's list, and which of its rows (or columns)."""


def qkv_rows(*, groups: int, queries: int, head_dim: int, tensor: int, rank: int) -> list[Source]:
    """Rows of one rank's linear_qkv; `queries` are query heads per group, parts are 0 query, 1 key, 2 value."""
    rows = []
    for group in range(groups):
        if not rank * groups <= group * tensor < (rank + 1) * groups:
            continue
        for query in range(queries):
            for feature in range(head_dim):
                rows.append((0, (group * queries + query) * head_dim + feature))
        for part in (1, 2):
            for feature in range(head_dim):
                rows.append((part, group * head_dim + feature))
    return rows


def gate_up_rows(*, ffn: int, tensor: int, rank: int) -> list[Source]:
    """Rows of one rank's linear_fc1: its share of gate (0), then its share of up (1)."""
    return [(part, row) for part in (0, 1) for row in range(ffn) if row // (ffn // tensor) == rank]


def even_rows(*, length: int, tensor: int, rank: int) -> list[Source]:
    """Rows (or columns) of one rank where one tensor is cut evenly."""
    return [(0, row) for row in range(length) if row // (length // tensor) == rank]


def vocabulary_rows(*, vocab: int, unit: int, tensor: int, rank: int) -> list[Source | None]:
    """Rows of one rank's embedding; None is a row of zeros. The whole is padded to a multiple of unit * tensor."""
    padded = vocab
    while padded % (unit * tensor):
        padded += 1
    share = padded // tensor
    return [(0, row) if row < vocab else None for row in range(rank * share, (rank + 1) * share)]


def gather(parts: list[Tensor], sources: list[Source] | list[Source | None], dim: int = 0) -> Tensor:
    """The tensor whose row i along `dim` is row sources[i] of its part."""
    rows = []
    for source in sources:
        if source is None:
            rows.append(torch.zeros_like(parts[0].select(dim, 0)))
        else:
            rows.append(parts[source[0]].select(dim, source[1]))
    return torch.stack(rows, dim=dim)
