"""Checkpoints as Megatron-LM's training loop writes them, made with Megatron-core alone: none of our code builds, fills or saves them.

Weights are put into Megatron's parameters row by row after tests/by_hand.py. The state dict is built as megatron/training/checkpointing.py
does (generate_state_dict, save_checkpoint).
"""

import argparse
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file

from swift_mega import api
from swift_mega.config.schema import Parallel
from swift_mega.convert.megatron.mcore import SKIPPED
from swift_mega.convert.megatron.torch_dist import read_metadata
from swift_mega.errors import UserError
from tests import by_hand, tiny
from tests.convert.megatron.test_mcore import same_bits

LAYERS, GROUPS, QUERIES, HEAD_DIM, PADDED = 4, 4, 2, 8, 384
"""Sizes of tests/tiny.py. The vocabulary of 131 is padded to 384, which no setting of ours does."""


def save(directory: Path, output: Path, sizes: tuple[int, int, int], settings: dict[str, Any], sharding: str) -> None:
    """One rank of a training run: takes steps, and saves as Megatron-LM does after iteration 10."""
    tensor, pipeline, expert = sizes
    state.initialize_model_parallel(
        tensor, pipeline, expert_model_parallel_size=expert, expert_tensor_parallel_size=1 if expert > 1 else None
    )
    model_parallel_cuda_manual_seed(1)
    experts, tied = settings.get("num_moe_experts"), settings.pop("tied")
    singly = settings.pop("singly", False)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=32,
        num_attention_heads=8,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        ffn_hidden_size=48,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        bf16=True,
        pipeline_dtype=torch.bfloat16,
        params_dtype=torch.bfloat16,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1 if expert > 1 else None,
        use_cpu_initialization=True,
        **settings,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    model = GPTModel(
        config,
        spec,
        vocab_size=PADDED,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
        pre_process=state.is_pipeline_first_stage(),
        post_process=state.is_pipeline_last_stage(),
    ).bfloat16()
    put(model, load_file(directory / "model.safetensors"), tensor, pipeline, expert, experts, tied)
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True), model
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=0.0, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
        ),
        [wrapped],
    )
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer.zero_grad()
    for buffer in [*wrapped.buffers, *wrapped.expert_parallel_buffers]:
        buffer.grad_data.normal_()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())  # the learning rate is 0
    metadata = {
        "distrib_optim_sharding_type": sharding,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": singly,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": state.get_data_parallel_group(with_context_parallel=True),
    }
    whole: dict[str, Any] = {
        "args": argparse.Namespace(hidden_size=32, iteration=10),
        "checkpoint_version": 3.0,
        "iteration": 10,
        "num_floating_point_operations_so_far": 1,
        "model": model.sharded_state_dict(metadata=metadata),
    }
    whole["optimizer"] = optimizer.sharded_state_dict(whole, metadata=metadata)
    whole["opt_param_scheduler"] = {"max_lr": 1e-3, "num_steps": 10}
    whole["rng_state"] = ShardedObject(
        "rng_state",
        [{"random_rng_state": random.getstate(), "torch_rng_state": torch.get_rng_state()}],
        (pipeline, tensor),
        (state.get_pipeline_model_parallel_rank(), state.get_tensor_model_parallel_rank()),
        replica_id=state.get_data_parallel_rank(with_context_parallel=True),
    )
    folder = output / "iter_0000010"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    strategy = FullyParallelSaveStrategyWrapper(
        TorchDistSaveShardedStrategy("torch_dist", 1), state.get_data_parallel_group(with_context_parallel=True)
    )
    kept = {key: value for key, value in metadata.items() if key != "dp_cp_group"}
    dist_checkpointing.save(whole, str(folder), strategy, content_metadata=kept)
    if dist.get_rank() == 0:
        (output / "latest_checkpointed_iteration.txt").write_text("10")


def put(
    model: GPTModel,
    source: dict[str, torch.Tensor],
    tensor: int,
    pipeline: int,
    expert: int,
    experts: int | None,
    tied: bool,
) -> None:
    """Fills all parameters of a rank; fails where one is not filled."""
    rank, first = state.get_tensor_model_parallel_rank(), state.get_pipeline_model_parallel_rank() * LAYERS // pipeline
    expert_rank = state.get_expert_model_parallel_rank()

    def cut(value: torch.Tensor, dim: int) -> torch.Tensor:
        return value.chunk(tensor, dim)[rank]

    def vocabulary(value: torch.Tensor) -> torch.Tensor:
        return cut(torch.cat([value, value.new_full((PADDED - len(value), value.shape[1]), 9)]), 0)

    wanted = {
        "embedding.word_embeddings.weight": vocabulary(source["model.embed_tokens.weight"]),
        "output_layer.weight": vocabulary(source["model.embed_tokens.weight" if tied else "lm_head.weight"]),
        "decoder.final_layernorm.weight": source["model.norm.weight"],
    }
    rows = by_hand.qkv_rows(groups=GROUPS, queries=QUERIES, head_dim=HEAD_DIM, tensor=tensor, rank=rank)
    for layer in range(LAYERS // pipeline):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{first + layer}."
        parts = [source[f"{there}self_attn.{part}_proj.weight"] for part in "qkv"]
        wanted[here + "self_attention.linear_qkv.weight"] = torch.stack([parts[part][row] for part, row in rows])
        wanted[here + "self_attention.linear_proj.weight"] = cut(source[there + "self_attn.o_proj.weight"], 1)
        wanted[here + "input_layernorm.weight"] = source[there + "input_layernorm.weight"]
        wanted[here + "pre_mlp_layernorm.weight"] = source[there + "post_attention_layernorm.weight"]
        for part in "qk":
            if (name := f"{there}self_attn.{part}_norm.weight") in source:
                wanted[f"{here}self_attention.{part}_layernorm.weight"] = source[name]
        if experts is None:
            gate, up = (cut(source[f"{there}mlp.{part}_proj.weight"], 0) for part in ("gate", "up"))
            wanted[here + "mlp.linear_fc1.weight"] = torch.cat([gate, up])
            wanted[here + "mlp.linear_fc2.weight"] = cut(source[there + "mlp.down_proj.weight"], 1)
            continue
        wanted[here + "mlp.router.weight"] = source[there + "mlp.gate.weight"]
        for number in range(experts // expert):
            mine = f"{there}mlp.experts.{expert_rank * experts // expert + number}."
            local = f"{here}mlp.experts.local_experts.{number}.linear_"
            gate, up, down = (source[f"{mine}{part}_proj.weight"] for part in ("gate", "up", "down"))
            if expert == 1:
                gate, up, down = cut(gate, 0), cut(up, 0), cut(down, 1)
            wanted[local + "fc1.weight"], wanted[local + "fc2.weight"] = torch.cat([gate, up]), down
    for name, parameter in model.named_parameters():
        assert parameter.shape == wanted[name].shape, (name, parameter.shape, wanted[name].shape)
        parameter.data.copy_(wanted[name])


MOE = dict(
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=24,
    moe_token_dispatcher_type="alltoall",
    qk_layernorm=True,
)
CASES = {
    "untied": ("llama", (2, 2, 1), dict(tied=False), "dp_reshardable"),
    "tied": ("llama_tied", (2, 2, 1), dict(tied=True), "fully_reshardable"),
    "data": ("llama", (1, 1, 1), dict(tied=False), "fully_reshardable"),
    "experts": ("qwen3_moe", (2, 1, 2), dict(tied=False, **MOE), "dp_reshardable"),
    "experts over tensor ranks": ("qwen3_moe", (2, 2, 1), dict(tied=False, **MOE), "dp_reshardable"),
    "each expert and half for itself": ("qwen3_moe", (2, 1, 2), dict(tied=False, singly=True, **MOE), "dp_reshardable"),
    "by number of layer": (
        "qwen3_moe", (1, 2, 2), dict(tied=False, **MOE, moe_layer_freq=[1] * LAYERS), "fully_reshardable"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_training_run_of_megatron_lm(ranks, tmp_path, capsys, case):
    family, sizes, settings, sharding = CASES[case]
    tied = family == "llama_tied"
    source = tiny.make(tmp_path / "hf", "llama" if tied else family, dtype=torch.bfloat16, tie_word_embeddings=tied)
    ranks(2 if case == "data" else 4, save, source, tmp_path / "run", sizes, settings, sharding)
    keys = read_metadata(tmp_path / "run" / "iter_0000010").state_dict_metadata.keys()
    apart = {"decoder.layers.3.mlp.experts.experts.2.linear_fc1.weight_v", "decoder.layers.mlp.linear_fc1.weight"}
    assert "singly" not in settings or apart & keys == {min(apart)}
    given = dict(source=str(tmp_path / "run"), to="hf", output=str(tmp_path / "back"))
    with pytest.raises(UserError, match=r"has no folder hf/, .* give them with --model DIR"):
        api.convert(**given)
    api.convert(**given, model=str(source))
    same_bits(tmp_path / "back", source)
    said = capsys.readouterr().out
    assert "tensors and objects of a training run's state (" in said and "were not read" in said


def _convert(given: dict[str, Any]) -> None:
    api.convert(**given)


def test_ranks_read_it_too(ranks, tmp_path):
    """Under torchrun, Megatron loads each rank's part."""
    source = tiny.make(tmp_path / "hf", "llama", dtype=torch.bfloat16)
    ranks(4, save, source, tmp_path / "run", (2, 2, 1), dict(tied=False), "dp_reshardable")
    given = dict(source=str(tmp_path / "run"), to="hf", output=str(tmp_path / "back"), model=str(source))
    ranks(2, _convert, given | {"parallel": Parallel(tensor=2)})
    same_bits(tmp_path / "back", source)


def test_the_optimizers_files_are_not_opened(ranks, tmp_path):
    """Where the optimizer state is in files of its own, these files may even be missing."""
    source = tiny.make(tmp_path / "hf", "llama", dtype=torch.bfloat16)
    ranks(4, save, source, tmp_path / "run", (2, 2, 1), dict(tied=False), "dp_reshardable")
    folder = tmp_path / "run" / "iter_0000010"
    weights = {
        info.relative_path
        for index, info in read_metadata(folder).storage_data.items()
        if not index.fqn.startswith(SKIPPED)
    }
    ranges = [
        (info.relative_path, info.offset, info.length)
        for index, info in read_metadata(folder).storage_data.items()
        if index.fqn.startswith(SKIPPED)
    ]
    assert sum(length for *_, length in ranges) > 200_000
    for name, offset, length in ranges:  # overwrites their bytes, or deletes their file
        if name in weights:
            with (folder / name).open("r+b") as file:
                file.seek(offset)
                file.write(b"\xff" * length)
        else:
            (folder / name).unlink(missing_ok=True)
    (folder / "common.pt").unlink(missing_ok=True)
    api.convert(source=str(tmp_path / "run"), to="hf", output=str(tmp_path / "back"), model=str(source))
    same_bits(tmp_path / "back", source)


def test_another_model_than_the_runs(ranks, tmp_path):
    source = tiny.make(tmp_path / "hf", "llama", dtype=torch.bfloat16)
    ranks(4, save, source, tmp_path / "run", (2, 2, 1), dict(tied=False), "dp_reshardable")
    other = tiny.make(tmp_path / "other", "llama", dtype=torch.bfloat16, intermediate_size=64)
    tied = tiny.make(tmp_path / "tied", "llama", dtype=torch.bfloat16, tie_word_embeddings=True)
    longer = tiny.make(tmp_path / "longer", "llama", dtype=torch.bfloat16, vocab_size=400)
    given = dict(source=str(tmp_path / "run"), to="hf", output=str(tmp_path / "back"))
    with pytest.raises(
        UserError, match=r"shapes differ: decoder\.layers\.mlp\.linear_fc1\.weight is \[4, 96, 32\], .*\[4, 128"
    ):
        api.convert(**given, model=str(other))
    with pytest.raises(UserError, match=r"1 that nothing reads \(output_layer\.weight\)"):
        api.convert(**given, model=str(tied))
    with pytest.raises(
        UserError, match=r"embedding\.word_embeddings\.weight is \[384, 32\], config.json says \[400, 32\]"
    ):
        api.convert(**given, model=str(longer))
    assert not (tmp_path / "back").exists()
