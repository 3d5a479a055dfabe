"""An adapter on all linears, merged while transformers loads, equals a model whose weights are summed by hand, for every type with
experts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CLIPConfig

from swift_mega import api
from swift_mega.errors import UserError
from swift_mega.export.in_memory import load_merged
from swift_mega.models.translate import hf_config
from swift_mega.verify import transformers_side
from tests import tiny

IDS = torch.arange(3, 40)[None]
MOE = {
    fields["model_type"]: name
    for name, fields in tiny.FAMILIES.items()
    if any("expert" in key for key in fields) and "dense" not in name and "written_as" not in fields
}
SCALE = 2.0


def random_adapter(model: Path, directory: Path, *, only: str = "") -> dict[str, Tensor]:
    """Writes factors for every linear of `model` but embeddings to `directory`; returns the weights of the files with their products
    added."""
    weights = {name: value for file in model.glob("*.safetensors") for name, value in load_file(file).items()}
    linears = [
        name
        for name, weight in weights.items()
        if weight.dim() == 2
        and name.endswith(".weight")
        and "embed" not in name
        and "lm_head" not in name
        and only in name
    ]
    factors, added = {}, dict(weights)
    for name in linears:
        module = "base_model.model." + name.removesuffix(".weight")
        rows, columns = weights[name].shape
        down, up = torch.randn(3, columns) * 0.2, torch.randn(rows, 3) * 0.2
        factors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        added[name] = (weights[name].float() + SCALE * (up @ down)).to(weights[name].dtype)
    directory.mkdir()
    save_file(factors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": "all-linear", "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return added


def by_hand(model: Path, weights: dict[str, Tensor], directory: Path) -> Path:
    directory.mkdir()
    for file in ("config.json", "generation_config.json"):
        shutil.copy(model / file, directory / file)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def logits(network: object) -> Tensor:
    with torch.no_grad():
        return network.eval()(IDS, use_cache=False).logits  # type: ignore[operator, attr-defined]


@pytest.mark.parametrize("kind", MOE)
def test_all_linears_of_a_type_with_experts(tmp_path: Path, kind: str) -> None:
    model = tiny.make(tmp_path / "model", MOE[kind], dtype=torch.bfloat16)
    added = random_adapter(model, tmp_path / "adapter")
    want = AutoModelForCausalLM.from_pretrained(by_hand(model, added, tmp_path / "added"))
    found = load_merged(model, tmp_path / "adapter", hf_config(model))
    assert found.dtype == want.dtype == torch.bfloat16 and found.generation_config == want.generation_config
    state = found.state_dict()
    for name, value in want.state_dict().items():
        assert torch.equal(state[name], value), name
    assert torch.equal(logits(found), logits(want))
    assert not torch.allclose(logits(found), logits(AutoModelForCausalLM.from_pretrained(model)), atol=1e-2)


def test_infer_verify_and_compare_take_it_whole(tmp_path: Path) -> None:
    """infer uses the same model that export writes. A wide dtype is not rounded in the reference of verify and compare."""
    model = tiny.make_chat(tmp_path / "model", "qwen2_moe_mixed", dtype=torch.bfloat16)
    random_adapter(model, tmp_path / "adapter")
    api.export(model=str(model), adapters=str(tmp_path / "adapter"), output=str(tmp_path / "merged"))
    answerer = api.infer(model=str(model), adapters=str(tmp_path / "adapter"))
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(answerer.network), logits(want))
    wide = transformers_side.network_of(model, tmp_path / "adapter", torch.float64)
    weights = load_file(model / "model.safetensors")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.shared_expert.down_proj"
    down, up = (factors[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
    torch.testing.assert_close(
        wide.get_submodule(name).weight,
        weights[f"{name}.weight"].double() + SCALE * (up @ down),
        rtol=1e-12,
        atol=1e-12,
    )


def test_a_factor_that_nothing_takes(tmp_path: Path) -> None:
    """A layer that the files have and the model does not, and a factor that PEFT would ignore with a warning."""
    model = tiny.make(tmp_path / "model", "llama")
    added = random_adapter(model, tmp_path / "adapter", only="layers.3")
    fewer = by_hand(model, added, tmp_path / "fewer")
    config = json.loads((fewer / "config.json").read_text())
    (fewer / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(
        UserError, match=r"has factors for model\.layers\.3\..* LlamaForCausalLM of transformers does not load"
    ):
        load_merged(fewer, tmp_path / "adapter", hf_config(fewer))
    with pytest.raises(UserError, match=r"PEFT does not apply all of .*layers\.3"):
        transformers_side.network_of(fewer, tmp_path / "adapter", torch.float32)
    with pytest.raises(UserError, match=r"transformers has no decoder for .*config\.json \(CLIPConfig\)"):
        load_merged(model, tmp_path / "adapter", CLIPConfig())
