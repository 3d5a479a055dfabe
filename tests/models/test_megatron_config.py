"""Fields of Megatron's config that a user sets: each takes effect or is refused, in the installed Megatron."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from swift_mega import api  # noqa: F401 - the facade comes before Megatron
from swift_mega.config import schema
from swift_mega.device import device as devices
from swift_mega.device.backends import Package
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.models import megatron_config
from swift_mega.models.megatron_config import check_passthrough
from swift_mega.models.megatron_fields import MODEL, ON_CUDA, OURS, PASSED_ON, REFUSED, UNREAD
from swift_mega.models.settings import Settings
from swift_mega.models.translate import load_settings

GROUPS = (PASSED_ON, ON_CUDA, OURS, MODEL, UNREAD, REFUSED)
SELECTIVE = schema.Train(recompute="selective")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Settings]:
    work: Path = tmp_path_factory.mktemp("models")
    return {
        name: load_settings(tiny.make(work / name, name))
        for name in ("llama", "llama_bias", "mixtral", "olmo2", "gemma2", "apertus", "deepseek_v3_moe")
    }


def fields() -> dict[str, Any]:
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    return {field.name: field for field in dataclasses.fields(MLATransformerConfig) if field.init}


def test_every_field_is_in_one_group() -> None:
    known = [name for group in GROUPS for name in group]
    assert len(known) == len(set(known))
    assert fields().keys() <= set(known)


def test_every_field_is_refused_or_handed_on(models: dict[str, Settings], cpu: Device) -> None:
    """A value that no model has is accepted only where some code reads it."""
    for name in fields():
        if name not in PASSED_ON:
            with pytest.raises(UserError, match=rf"^model\.megatron\.{name}='something else'"):
                check_passthrough({name: "something else"}, models["llama"], schema.Train(), cpu)


def test_a_field_of_a_newer_megatron_is_refused(models: dict[str, Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swift_mega.models.megatron_config.REFUSED", {})
    with pytest.raises(
        UserError, match=r"fp32_residual_connection=True is refused: this field of a newer Megatron is not known here"
    ):
        check_passthrough({"fp32_residual_connection": True}, models["llama"], schema.Train())


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        ("llama", {"moe_router_topk_": 2}, "no such field; did you mean moe_router_topk?"),
        ("llama", {"cp_comm_type": "a2a"}, "this follows from the model and the layout"),
        ("llama", {"num_layers": 2}, "would train another model than config.json states"),
        ("mixtral", {"moe_router_topk": 3}, "would train another model than config.json states"),
        ("llama", {"attention_dropout": 0.1}, "model.megatron.attention_dropout=0.1 would have no effect"),
        ("llama", {"window_size": [128, 0]}, "takes windows from the model's config.json"),
        ("llama", {"cpu_offloading": True}, "set train.offload_activations"),
        ("mixtral", {"moe_expert_capacity_factor": 1.5}, "is refused: which tokens an expert drops would depend on"),
        ("llama", {"hidden_dropout": 1.0}, "hidden_dropout=1.0 cannot take effect: expected a probability"),
        ("llama", {"hidden_dropout": "0.1"}, "expected a probability"),
        ("llama", {"bias_dropout_fusion": True}, "bias_dropout_fusion=True needs CUDA, and ranks run on the CPU"),
        ("llama", {"distribute_saved_activations": True}, "only train.recompute=full reads it"),
        ("llama", {"moe_router_dtype": "fp32"}, "this model has no experts"),
        ("mixtral", {"moe_router_dtype": "fp16"}, "expected fp32, fp64 or null"),
        ("llama", {"moe_router_enable_expert_bias": True}, "this model has no experts"),
        ("mixtral", {"moe_router_bias_update_rate": 0.1}, "it needs moe_router_enable_expert_bias=true"),
        ("mixtral", {"recompute_modules": ["mlp"]}, "mlp: every MLP of this model is a mixture of experts"),
        ("llama", {"recompute_modules": ["moe"]}, "moe: this model has no experts"),
        ("mixtral", {"recompute_modules": ["shared_experts"]}, "shared_experts: this model has no shared experts"),
        ("olmo2", {"recompute_modules": ["layernorm"]}, "layernorm: this model has no norms before attention and MLP"),
        ("deepseek_v3_moe", {"recompute_modules": ["mla_up_proj"]}, "mla_up_proj: latent attention here is not Megatron's"),
        ("mixtral", {"recompute_modules": ["moe_act"]}, "moe_act: only Megatron's grouped experts read it"),
        ("llama", {"recompute_modules": ["norms"]}, "'norms' is none of core_attn, mlp, layernorm, moe, shared_experts"),
        ("llama", {"recompute_modules": "mlp"}, "expected a list of core_attn"),
    ],
)  # fmt: skip
def test_refused(models: dict[str, Settings], cpu: Device, model: str, given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=r"model\.megatron") as error:
        check_passthrough(given, models[model], SELECTIVE, cpu)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        ("gemma2", {"bias_dropout_fusion": True}, "layers are joined in another way"),
        (
            "llama_bias",
            {"bias_dropout_fusion": True, "recompute_modules": ["mlp"]},
            "MLPs have biases, so its layers are ours",
        ),
        ("apertus", {"bias_activation_fusion": True}, "activation has parameters"),
        ("llama", {"fp8_margin": 1}, "it needs fp8"),
        ("llama", {"moe_shared_expert_overlap": True}, "this model has no experts"),
    ],
)
def test_refused_on_cuda(models: dict[str, Settings], model: str, given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_passthrough(given, models[model], SELECTIVE, None)


@pytest.mark.parametrize(
    ("given", "dtype", "version", "said"),
    [
        ({"fp8": "e4m3"}, torch.bfloat16, None, "fp8='e4m3' needs Transformer Engine, which is not installed; install it"),
        ({"moe_permute_fusion": True}, torch.bfloat16, None, "moe_permute_fusion=True needs Transformer Engine, which is not"),
        ({"fp8": "e4m3"}, torch.float32, "2.20", "layers of Transformer Engine, and a model in float32 has Megatron's; set model.dtype"),
        ({"gradient_accumulation_fusion": True}, torch.bfloat16, "2.20", "apex's kernel fused_weight_gradient_mlp_cuda, which is not"),
        ({"fp8": "e4m3", "fp8_margin": 1, "moe_router_fusion": True}, torch.bfloat16, "2.20", None),
        ({"bias_dropout_fusion": True, "recompute_modules": ["layernorm"]}, torch.bfloat16, None, "since recompute_modules has layernorm"),
    ],
)  # fmt: skip
def test_kernels_that_are_not_there(
    models: dict[str, Settings],
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, object],
    dtype: torch.dtype,
    version: str | None,
    said: str | None,
) -> None:
    """On a stand-in for CUDA, with and without Transformer Engine; apex is missing."""
    for module in (devices, megatron_config):
        monkeypatch.setattr(module, "transformer_engine", lambda: Package(name="Transformer Engine", version=version))
    where = Device(kind="cuda", device=devices.CPU, backend="gloo", name="as if")
    if said is None:
        return check_passthrough(given, models["mixtral"], SELECTIVE, where, dtype)
    with pytest.raises(UserError) as error:
        check_passthrough(given, models["mixtral"], SELECTIVE, where, dtype)
    assert said in str(error.value)


def test_recompute_modules_want_selective_recomputation(models: dict[str, Settings]) -> None:
    with pytest.raises(
        UserError, match=r"recompute_modules=\['mlp'\] cannot take effect: only train.recompute=selective"
    ):
        check_passthrough({"recompute_modules": ["mlp"]}, models["llama"], schema.Train())


def test_what_changes_nothing_is_taken(models: dict[str, Settings], cpu: Device) -> None:
    given = {
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "moe_router_topk": 2,
        "bias_dropout_fusion": False,
    }
    check_passthrough(given, models["mixtral"], schema.Train(), cpu)


def test_what_is_honoured_is_taken(models: dict[str, Settings], cpu: Device) -> None:
    for model, modules in (
        ("gemma2", ["core_attn", "mlp", "layernorm"]),
        ("deepseek_v3_moe", ["moe", "shared_experts", "mlp"]),
    ):
        check_passthrough({"hidden_dropout": 0.1, "recompute_modules": modules}, models[model], SELECTIVE, cpu)
    given = {"moe_router_dtype": None, "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 1e-3}
    check_passthrough(given, models["mixtral"], schema.Train(), cpu)
