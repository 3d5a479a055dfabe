"""Every setting that `plan` takes changes its result, is refused as training refuses it, or is known to need no memory."""

import dataclasses
from pathlib import Path

import pytest

import tiny
from swift_mega import api
from swift_mega.cli.table import VERBS
from swift_mega.config.tree import settings
from swift_mega.errors import UserError
from swift_mega.memory.report import MemoryEstimate

BASE = ("data.max_length=512", "tuner.type=lora", "tuner.rank=4")
UNFUSED = 'model.megatron={"bias_activation_fusion": false}'
"""Then the MLP, not attention, needs the most memory of a layer."""
CHANGES: dict[str, tuple[str, tuple[str, ...], int]] = {
    # setting -> another value, the settings it needs, ranks
    "model.dtype": ("float32", (), 1),
    "model.vocab_divisible_by": ("1024", (), 1),
    "model.megatron": ('{"bias_activation_fusion": false}', ("tuner.type=full",), 1),
    "data.max_length": ("1024", (), 1),
    "tuner.type": ("full", (), 1),
    "tuner.rank": ("8", (), 1),
    "tuner.target_modules": ("q_proj", (), 1),
    "train.micro_batch_size": ("2", (), 1),
    "train.global_batch_size": ("1", ("parallel.pipeline=2",), 2),
    "train.recompute": ("full", (), 1),
    "train.recompute_method": ("block", ("train.recompute=full",), 1),
    "train.recompute_layers": ("2", ("train.recompute=full",), 1),
    "train.tile_mlp": ("true", (), 1),
    "train.mlp_tile_size": (
        "512",
        ("train.tile_mlp=true", "train.recompute=full", "train.loss_chunk_size=16", UNFUSED),
        1,
    ),
    "train.loss_chunk_size": ("16", ("tuner.type=full",), 1),
    "train.offload_activations": ("true", ("train.recompute=full",), 1),
    "optim.cpu_offload": ("true", (), 1),
    "optim.offload_fraction": ("0.5", ("optim.cpu_offload=true",), 1),
    "parallel.tensor": ("2", (), 2),
    "parallel.pipeline": ("2", (), 2),
    "parallel.virtual_pipeline": ("2", ("parallel.pipeline=2",), 2),
    "parallel.pipeline_layout": ("3,1", ("parallel.pipeline=2",), 2),
    "parallel.first_stage_layers": ("1", ("parallel.pipeline=2",), 2),
    "parallel.last_stage_layers": ("1", ("parallel.pipeline=2",), 2),
    "parallel.sequence": ("true", ("parallel.tensor=2",), 2),
    "parallel.context": ("2", (), 2),
    "parallel.cp": ("allgather", ("parallel.context=2",), 2),
    "parallel.ulysses": ("2", ("parallel.context=8", "parallel.cp=hybrid"), 8),
    "parallel.distributed_optimizer": ("false", (), 2),
    "parallel.gradients_in_float32": ("false", (), 1),
}
REFUSED = {
    "parallel.expert": ("2", "expert"), "parallel.expert_tensor": ("2", "expert"),
    "train.kernels": ("reference", "train.kernels=reference has no memory formula"),
    "train.kernels_by_op": ('{"rope": "reference"}', "train.kernels=reference has no memory formula"),
}  # fmt: skip
"""This model has no experts, and the formula does not support models with experts, nor plain torch forms."""
FREE = {
    "parallel.overlap_grad_reduce": "the same buffer, in buckets", "parallel.overlap_param_gather": "the same",
    "parallel.ddp_bucket_size": "the same", "parallel.distributed_timeout_minutes": "a time",
    "model.path": "the model itself", "model.dequantize": "a quantised checkpoint is planned as it is trained, as plain weights",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("plan") / "model", "llama", max_position_embeddings=4096)


def plan(model: Path, changes: list[str], ranks: int) -> MemoryEstimate:
    names = {change.partition("=")[0] for change in changes}
    base = [one for one in BASE if one.partition("=")[0] not in names]
    if any(change.startswith("tuner.type=") for change in changes):
        base.remove("tuner.rank=4")
    run = api.load_recipe(None, [f"model.path={model}", *base, *changes]).run
    return api.plan_memory(run, ranks=ranks, gpu_bytes=8 << 30)


def test_every_setting_is_listed() -> None:
    taken = {key for key in settings() if VERBS["plan"].takes(key)}
    assert taken == {*CHANGES, *REFUSED, *FREE}


@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_changes_the_answer(model: Path, key: str) -> None:
    value, beside, ranks = CHANGES[key]
    before, after = plan(model, list(beside), ranks), plan(model, [*beside, f"{key}={value}"], ranks)
    assert (
        dataclasses.replace(before.memory, moment="") != dataclasses.replace(after.memory, moment="")
        or before.longest != after.longest
    )


@pytest.mark.parametrize("changes, said", [
    *(([f"{key}={value}"], said) for key, (value, said) in REFUSED.items()),
    (["model.dtype=float32", "parallel.gradients_in_float32=false"], "gradients_in_float32=false sums gradients"),
    (["model.dtype=float64"], "set parallel.distributed_optimizer=false and optim.clip_grad=0"),
    (["tuner.target_modules=q_prj"], "'q_prj' names no linear"),
    (["model.megatron.hidden_sizes=4"], "did you mean hidden_size"),
    (["tuner.type=lorra"], "known: full, lora"),
    (["tuner.type=toys.layers"], "tuner.type=toys.layers has no memory formula; estimate with lora"),
    (["objective.name=toys.dpo"], "objective.name=toys.dpo has no memory formula; estimate with next_token"),
], ids=lambda value: value[0] if isinstance(value, list) else "")  # fmt: skip
def test_a_plan_refuses_what_training_does(model: Path, changes: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(model, changes, 2)
    assert said in str(caught.value)


def test_parameters_of_an_adapter_are_those_that_peft_makes(model: Path) -> None:
    """Gradients are summed in 4 bytes each: their number is PEFT's number of trained parameters, for any choice of linears."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for targets in (["q_proj"], ["k_proj", "down_proj"], ["o_proj", "gate_proj"], ["up_proj", "v_proj", "q_proj"]):
        net = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules=targets))
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        found = plan(model, [f"tuner.target_modules={','.join(targets)}"], 1).memory
        assert found.gradients == 4 * trained
    one = plan(model, ["tuner.target_modules=model.layers.2.self_attn.q_proj"], 1).memory.gradients
    assert 4 * one == plan(model, ["tuner.target_modules=q_proj"], 1).memory.gradients


def test_a_row_holds_a_microbatch(model: Path) -> None:
    """Two examples of 512 tokens are a row of 1024; the padded vocabulary has that many more rows."""
    two = plan(model, ["train.micro_batch_size=2"], 1)
    assert two.tokens == 1024 and two.memory == plan(model, ["data.max_length=1024"], 1).memory
    rows = [plan(model, ["tuner.type=full", f"model.vocab_divisible_by={n}"], 1).memory.weights for n in (128, 1024)]
    assert rows[1] - rows[0] == 2 * 2 * 32 * (1024 - 256)  # bfloat16, embedding and head, 32 features, 131 rows padded
