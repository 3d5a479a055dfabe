"""Adapters that change the output layer of a tied model: PEFT changes logits alone, so the merged model has an output layer of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from swift_mega import api
from swift_mega.cli import main
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.errors import UserError
from swift_mega.export.in_memory import load_merged
from swift_mega.models.translate import hf_config

IDS = torch.arange(3, 40)[None]


def made_by_peft(base: Path, directory: Path, *, copies: bool) -> Path:
    """Factors on q_proj and the output layer. copies: PEFT's own default, which saves the weight of the output layer beside them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    network.save_pretrained(directory, save_embedding_layers="auto" if copies else False)
    return directory


def logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        network = PeftModel.from_pretrained(network, str(adapter))
    with torch.no_grad():
        return network.eval()(IDS).logits


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tied"), "llama_tied", num_hidden_layers=2)


@pytest.fixture(scope="module")
def adapter(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by_peft(tied, tmp_path_factory.mktemp("adapter"), copies=False)


@pytest.mark.parametrize("copy", [False, True])
def test_merged_with_an_output_layer_of_its_own(tied, adapter, tmp_path, copy):
    """Logits are PEFT's unmerged ones, embeddings are the base's, and swift_mega can read the result. copy: the files have the head too."""
    base = tied
    if copy:
        base = Path(shutil.copytree(tied, tmp_path / "copy"))
        tensors = load_file(base / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert (
        main(
            [
                "export",
                "--model",
                str(base),
                "--adapters",
                str(adapter),
                "--merge_lora",
                "true",
                "--output",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tied, adapter), atol=1e-5, rtol=0)
    found, want = Checkpoint(tmp_path / "out"), Checkpoint(tied)
    assert torch.equal(found.read("model.embed_tokens.weight"), want.read("model.embed_tokens.weight"))
    assert not torch.equal(found.read("lm_head.weight"), want.read("model.embed_tokens.weight"))
    in_memory = load_merged(base, adapter, hf_config(base))  # what infer asks
    with torch.no_grad():
        torch.testing.assert_close(in_memory.eval()(IDS).logits, logits(tied, adapter), atol=1e-5, rtol=0)
    assert api.plan(source=str(tmp_path / "out")).table()


def test_a_head_that_is_not_the_embedding_is_refused(tied, adapter, tmp_path):
    base = Path(shutil.copytree(tied, tmp_path / "copy"))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"tie_word_embeddings=true, but lm_head.weight differs from model.embed_tokens.weight"
    ):
        api.export(model=str(base), adapters=str(adapter), output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_type_of_which_nothing_is_known(tied, adapter, tmp_path):
    """For an unknown type, it is not known whether the output layer is tied, so a change of it is refused."""
    base = Path(shutil.copytree(tied, tmp_path / "copy"))
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**fields, "model_type": "unheard_of"}))
    with pytest.raises(
        UserError, match=r"changes lm_head, and whether .* ties it .* not known .*; say tie_word_embeddings=false"
    ):
        api.export(model=str(base), adapters=str(adapter), output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_change_of_both_is_refused(tied, adapter, tmp_path):
    made = Path(shutil.copytree(adapter, tmp_path / "made"))
    fields = json.loads((made / "adapter_config.json").read_text())
    (made / "adapter_config.json").write_text(json.dumps({**fields, "ensure_weight_tying": True}))
    with pytest.raises(UserError, match="ensure_weight_tying=true changes output layer and embedding alike"):
        api.export(model=str(tied), adapters=str(made), output=str(tmp_path / "out"))


def test_weights_that_peft_saves_beside_factors(tmp_path):
    """lm_head.base_layer.weight is dropped where it equals the base's, and refused where it differs, because PEFT would load it."""
    base = tiny.make(tmp_path / "base", "llama", num_hidden_layers=2)
    made = made_by_peft(base, tmp_path / "made", copies=True)
    assert "base_model.model.lm_head.base_layer.weight" in Checkpoint(made).entries
    api.export(model=str(base), adapters=str(made), output=str(tmp_path / "out"))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(base, made), atol=1e-5, rtol=0)
    tensors = load_file(made / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(tensors, made / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError,
        match=r"holds base_model.model.lm_head.base_layer.weight, a weight \[131, 32\] that is not the one in",
    ):
        api.export(model=str(base), adapters=str(made), output=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
