"""Makes and calls Megatron's real TEDotProductAttention for context ranks: `python -m tests.models.context_on_te WORK`.

A program and not a test, for the reasons given in tests/models/on_te.py. Everything up to Transformer Engine's DotProductAttention.forward
runs. That function needs a GPU; a replacement records its arguments. WORK/found.json has the result of each layout.
"""

import argparse
import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.models.on_te import DTYPE, ON_TE, cuda_answers, made, wrong  # isort: skip  # before Megatron: it sets the device up

import torch
import torch.distributed as dist

import tiny
from swift_mega.config import schema
from swift_mega.convert.source import Source
from swift_mega.device.device import setup
from swift_mega.launch.torchrun import run_ranks
from swift_mega.models.modules.attention import segments
from swift_mega.models.translate import load_settings
from swift_mega.parallel.groups import init
from swift_mega.parallel.layout import Layout, parse_layout, plan_layout
from swift_mega.parallel.mesh import Mesh
from swift_mega.parallel.sequence import local_tokens
from swift_mega.train.step import local_part
from swift_mega.verify import parity
from tests import te_stand_in

MODELS = {
    "cp2-te:p2p": "llama",
    "cp2-te:a2a": "mistral",
    "tp2-cp2-te:allgather-sp": "mistral",
    "cp4-te:a2a2+p2p": "llama_bias_8_2",
}


def of_rank(model: Path, layout: Layout) -> dict[str, Any]:
    """The result of one rank. Collective."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from transformer_engine.pytorch import DotProductAttention
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    groups, source, run = init(layout), Source(model), schema.Run()
    assert groups.row is not None
    part = made(run, groups, source, ON_TE, reads_inputs=False)
    ours = dataclasses.replace(groups, layout=dataclasses.replace(layout, mesh=Mesh(1, layout.context)))
    found: dict[str, Any] = {"wrong": wrong(part, made(run, ours, source, setup(), reads_inputs=False))}
    core = part.chunks[0].decoder.layers[0].self_attention.core_attention
    te_attention = core.te_attention
    members = te_attention.cp_group if isinstance(te_attention.cp_group, list) else [te_attention.cp_group]
    found |= {
        "class": type(te_attention).__name__,
        "communication": te_attention.cp_comm_type,
        "window": te_attention.window_size,
        "scale": te_attention.softmax_scale,
        "dropout": te_attention.attention_dropout,
        "groups": [dist.get_process_group_ranks(group) for group in members],
        "ranks": list(te_attention.cp_global_ranks),
        "row": [dist.get_process_group_ranks(group) for group in (groups.row.ulysses, groups.row.ring)],
    }
    for name in ("__init__", "forward"):
        real, stand_in = (getattr(kind, name) for kind in (TEDotProductAttention, te_stand_in.StandIn))
        found[name] = te_stand_in.parameters(real) == te_stand_in.parameters(stand_in)

    row = parity.microbatches(parity.example_rows(97, examples=4 * layout.data), layout, 0)[0]
    starts = row.cu_seqlens
    cut = context_parallel.get_batch_on_this_cp_rank(starts, row.tokens, row.labels, row.positions, groups.context)
    mine = local_part(row, groups.row)
    found["cut"] = all(map(torch.equal, cut, (mine.tokens, mine.labels, mine.positions)))
    padded = context_parallel.pad_thd_sequences_for_cp(*_packed(row), 2 * layout.context)
    end = int(padded[2][-1])
    found["padding"] = torch.equal(padded[0], row.tokens[:end]) and torch.equal(padded[1], row.labels[:end])
    found["places"] = local_tokens(starts.tolist(), layout.mesh, groups.row.rank).tolist()

    given: dict[str, Any] = {}

    def forward(self: Any, *args: Any, **named: Any) -> torch.Tensor:
        given.update(inspect.signature(plain).bind(self, *args, **named).arguments)
        return args[0].flatten(1)

    plain, DotProductAttention.forward = DotProductAttention.forward, forward
    heads = part.config.num_attention_heads // layout.tensor
    shape = (len(mine.tokens), 1, heads, part.config.kv_channels)
    what = segments(part.settings, mine.positions, starts, DTYPE, groups.row)
    out = core(*(torch.randn(shape, dtype=DTYPE) for _ in range(3)), packed_seq_params=what)
    lengths = [given[f"cu_seqlens_{name}"] for name in ("q", "kv", "q_padded", "kv_padded")]
    found["call"] = {
        "out": list(out.shape),
        "one": len(set(map(id, lengths))) == 1,
        "starts": torch.equal(lengths[0], starts),
        "format": given["qkv_format"],
        "mask": given["attn_mask_type"],
        "longest": [given["max_seqlen_q"], given["max_seqlen_kv"]],
        "max": int(starts.diff().max()),
        "padding": given.get("pad_between_seqs"),
    }
    return found


def _packed(row: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and starts of the examples of a row, without padding."""
    lengths = [length for length in row.lengths.tolist() if length]
    places = [
        torch.arange(start, start + length) for start, length in zip(row.cu_seqlens.tolist(), lengths, strict=False)
    ]
    local = torch.cat(places)
    return row.tokens[local], row.labels[local], torch.tensor([0, *lengths]).cumsum(0)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    options.add_argument("work", type=Path)
    work: Path = options.parse_args().work
    with cuda_answers():
        import transformer_engine.pytorch  # noqa: F401
    found: Mapping[str, Any] = {}
    for name, family in MODELS.items():
        parallel, world = parse_layout(name)
        model = tiny.make(work / name, family, dtype=DTYPE)
        layout = plan_layout(parallel, load_settings(model).shape, world)
        found = {**found, name: run_ranks(world, everyone, model, layout, device_kind="cpu")}
    (work / "found.json").write_text(json.dumps(found, indent=1))
    return 0


def everyone(model: Path, layout: Layout) -> list[Any]:
    """The results of all ranks."""
    answers: list[Any] = [None] * layout.world
    dist.all_gather_object(answers, of_rank(model, layout))
    return answers


if __name__ == "__main__":
    raise SystemExit(main())
