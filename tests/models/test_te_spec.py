"""With Transformer Engine's modules, as on CUDA, every family has the parameters that its rules name, with the values of Megatron's own
modules.

The modules are made and filled on the CPU, in a process of their own (tests/models/on_te.py says why). Nothing is computed.
"""

import re
from typing import Any

import pytest

import tiny
from tests.models.te_process import FOLDER, NOT_BUILT, found_by

REFUSED = "this model has none|key-value heads|experts have biases, which Megatron cannot split"
LAYOUTS = ("single", "tp2-sp", "tp2-ep2-etp1-sp")

pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason=NOT_BUILT),
    pytest.mark.timeout(1200),  # the first test waits for all models
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is wrong, by layout, family and tuner."""
    return found_by("on_te", tmp_path_factory.mktemp("te"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(found: dict[str, Any], family: str, layout: str) -> None:
    """One rule covers each parameter of Transformer Engine's modules. Its shape, numbers and attributes are those of the local modules.

    The Hugging Face directory written from them equals the source, tensor for tensor. The Megatron checkpoint of each kind of modules
    fills the other kind. With adapters, the same holds for the base and for the adapters.
    """
    answer = found[layout][family]
    if "refused" in answer:
        assert layout != "single" and re.search(REFUSED, answer["refused"]), answer["refused"]
        return
    for tuner, told in answer.items():
        assert not told["wrong"], (tuner, told["wrong"][:10])
        te = {line.split(": ")[0] for line in told["classes"] if "megatron TE" in line}
        assert {"decoder.layers.self_attention.linear_proj"} < te, told["classes"]
    assert answer.keys() == {"full", "lora"}


@pytest.mark.parametrize(
    ("family", "tuner", "expected"),
    [
        ("llama", "full", "self_attention.linear_qkv: megatron TELayerNormColumnParallelLinear"),
        ("llama", "full", "mlp.linear_fc1: megatron TELayerNormColumnParallelLinear"),
        ("llama", "lora", "self_attention.linear_qkv: megatron TEColumnParallelLinear"),
        ("llama", "lora", "input_layernorm: transformer_engine RMSNorm"),
        ("gpt2", "full", "input_layernorm: transformer_engine LayerNorm"),
        ("qwen3_moe", "full", "mlp.experts.linear_fc1: megatron TEColumnParallelGroupedLinear"),
        ("gpt_oss", "full", "mlp.experts.linear_fc2: megatron TERowParallelGroupedLinear"),
        ("deepseek_v2", "full", "self_attention.linear_kv_up_proj: megatron TEColumnParallelLinear"),
        ("cohere", "full", "input_layernorm: swift_mega Norm"),
    ],
)
def test_which_modules(found: dict[str, Any], family: str, tuner: str, expected: str) -> None:
    """Which modules are Transformer Engine's, where this differs between families and tuners."""
    assert f"decoder.layers.{expected}" in found["single"][family][tuner]["classes"]


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("family", ["llama", "gpt2", "apertus", "cohere", "deepseek_v3_moe", "qwen2_moe"])
def test_by_tiles(found: dict[str, Any], family: str, layout: str) -> None:
    """With train.tile_mlp, parameters, numbers, attributes and checkpoints are the same, and the linears are Transformer Engine's."""
    answer = found[f"tiled {layout}"][family]
    if "refused" in answer:
        assert re.search(REFUSED, answer["refused"]), answer["refused"]
        return
    for tuner, told in answer.items():
        assert not told["wrong"], (tuner, told["wrong"][:10])
        assert any(re.search(r"mlp\.(shared_experts\.)?linear_fc2: megatron TERow", line) for line in told["classes"])
    assert answer.keys() == {"full", "lora"}
