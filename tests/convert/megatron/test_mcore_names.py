"""The names of tensors in a Megatron checkpoint, and which tensors it may have that a model does not need."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint import FileSystemReader

from swift_mega import api
from swift_mega.config import schema
from swift_mega.convert.megatron.mcore import load_mcore
from swift_mega.convert.source import Source
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.models.build import ModelPart
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import plan_layout
from swift_mega.train.build import build_part
from tests import tiny

LAYER = "decoder.layers.{}."
QKV_NORM, MLP_NORM, ALONE = "self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."


@pytest.mark.parametrize(
    ("family", "norms"),
    [
        ("llama", {"decoder.layers." + name + "weight" for name in (QKV_NORM, MLP_NORM)}),
        ("gpt2", {f"decoder.layers.{name}{leaf}" for name in (QKV_NORM, MLP_NORM) for leaf in ("weight", "bias")}),
        ("qwen3_moe", {LAYER.format(i) + name + "weight" for i in range(4) for name in (QKV_NORM, ALONE)}),
        (
            "qwen3_moe_mixed",
            {LAYER.format(i) + QKV_NORM + "weight" for i in range(4)}
            | {LAYER.format(i) + (MLP_NORM if i == 1 else ALONE) + "weight" for i in range(4)},
        ),
        (
            "deepseek_v2",
            {LAYER.format(i) + "input_layernorm.weight" for i in range(4)}
            | {
                LAYER.format(i) + f"self_attention.linear_{x}_up_proj.layer_norm_weight"
                for i in range(4)
                for x in ("q", "kv")
            }
            | {LAYER.format(i) + (MLP_NORM if i == 0 else ALONE) + "weight" for i in range(4)},
        ),
    ],
)
def test_names_of_norms(tmp_path: Path, family: str, norms: set[str]) -> None:
    """The names in Megatron-LM's layers with Transformer Engine, written out by hand from its layer specs."""
    source = tiny.make(tmp_path / "hf", family)
    api.convert(source=str(source), to="mcore", output=str(tmp_path / "mcore"))
    names = FileSystemReader(tmp_path / "mcore" / "release").read_metadata().state_dict_metadata
    found = {name.split("/")[0] for name in names if "layernorm." in name or "layer_norm_" in name}
    assert {name for name in found if "_extra_state" not in name} - norms <= {
        "decoder.final_layernorm.weight",
        "decoder.final_layernorm.bias",
        *latent_norms(names),
    }
    assert norms <= found


def latent_norms(names: Any) -> set[str]:
    """Norms of heads have the same name in every spec."""
    return {name for name in names if any(part in name for part in (".q_layernorm", ".k_layernorm"))}


State = dict[str, Any]


def optimizer(state: State) -> None:
    """What a training checkpoint has beside the weights."""
    moment = torch.zeros(4)
    state["optimizer"] = {"exp_avg": ShardedTensor.from_rank_offsets("optimizer.state.exp_avg", moment)}


def scales(state: State) -> None:
    """Adds the tensors that only Transformer Engine's norms write, and removes those that only Megatron's own linears write."""
    name = "decoder.final_layernorm._extra_state"
    state["model"] = {key: value for key, value in state["model"].items() if "_extra_state" not in key}
    state["model"][name] = ShardedObject(name, torch.zeros(1), (1,), (0,))


def less(state: State) -> None:
    del state["model"]["decoder.final_layernorm.weight"]


def more(state: State) -> None:
    name = "decoder.final_layernorm.bias"
    state["model"][name] = ShardedTensor.from_rank_offsets(name, torch.zeros(32))


def written_and_read(source: Path, directory: Path, change: Callable[[State], None], cpu: Device) -> str:
    """One rank: writes a checkpoint like Megatron-LM's except for `change`, reads it into an empty model, and returns the UserError."""
    groups = parallel_groups.init(plan_layout(schema.Parallel(), load_settings(source).shape, 1))

    def part() -> ModelPart:
        return build_part(schema.Run(), cpu, groups, dtype=torch.float32, reads_inputs=False, source=Source(source))

    writer, reader = part(), part()
    state: State = {"model": writer.chunks[0].sharded_state_dict(metadata={"dp_cp_group": groups.data_context})}
    change(state)
    directory.mkdir()
    dist_checkpointing.save(state, str(directory))
    for named in reader.named_parameters():
        named.parameter.data.fill_(7)
    try:
        load_mcore(reader, groups, directory)
    except UserError as error:
        return str(error)
    for one, other in zip(reader.named_parameters(), writer.named_parameters(), strict=True):
        assert torch.equal(one.parameter, other.parameter), one.name
    return ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (optimizer, ""),
        (scales, ""),
        (less, r"1 tensors missing (decoder.final_layernorm.weight), 0 that nothing reads ()"),
        (more, r"0 tensors missing (), 1 that nothing reads (decoder.final_layernorm.bias)"),
    ],
)
def test_what_a_model_does_not_ask_for(
    ranks: Any, cpu: Device, tmp_path: Path, change: Callable[[State], None], said: str
) -> None:
    """State of optimizers and of FP8 is ignored. A tensor that is missing, or that nothing reads, is an error with its name."""
    source = tiny.make(tmp_path / "hf", "llama")
    found = ranks(1, written_and_read, source, tmp_path / "mcore", change, cpu)
    assert found == "" if not said else f"does not fit its config.json: {said}; use" in found, found
