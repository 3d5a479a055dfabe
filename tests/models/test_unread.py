"""Fields that transformers does not read, and rates of dropout: a run prints them and continues."""

import pytest
import torch

from swift_mega.errors import UserError
from swift_mega.models.translate import DROPOUT_NOTE, hf_config, load_settings
from swift_mega.models.unread import read_by_transformers
from tests import tiny
from tests.models.test_families import write
from tests.models.test_published_configs import write as published

PIPELINES = {"text-generation": {"impl": "instruct_pipeline.InstructionTextGenerationPipeline"}}


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        ("gemma2", dict(sliding_window_size=4096), "sliding_window_size=4096"),
        (
            "phi3",
            dict(full_attn_mod=1, interpolate_factor=2, mlp_bias=True, lm_head_bias=True),
            "full_attn_mod=1, interpolate_factor=2, lm_head_bias=True, mlp_bias=True",
        ),
        (
            "gpt2",
            dict(n_special=3, predict_special_tokens=True, output_past=True),
            "n_special=3, output_past=True, predict_special_tokens=True",
        ),
        ("gpt_neox", dict(custom_pipelines=PIPELINES), "custom_pipelines={'text-generation': {'impl': 'instruc..."),
        ("falcon", dict(ff_factor=2), "ff_factor=2"),
        ("llama", dict(attn_logit_softcapping=5.0, qk_layernorm=True), "attn_logit_softcapping=5.0, qk_layernorm=True"),
        ("qwen2", dict(attention_bias=False), "attention_bias=False"),
        ("gpt_bigcode", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        ("mixtral", dict(num_experts=4, n_group=2), "n_group=2"),  # transformers' other name of num_local_experts
    ],
)
def test_what_transformers_does_not_read_is_a_note(tmp_path, name, fields, named):
    """transformers computes the same with such fields and without."""
    plain, odd = write(tmp_path / "plain", name), write(tmp_path / "odd", name, **fields)
    logits = [_model(hf_config(folder))(torch.arange(3, 20)[None]).logits for folder in (plain, odd)]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)
    said = f"config.json has fields that transformers' {name} does not read, so they change nothing: {named}"
    assert set(load_settings(odd).notes) - set(load_settings(plain).notes) == {said}


def _model(config):
    """The same random model of transformers every time."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("llama", "partial_rotary_factor"),  # read by the code of all rotary embeddings
        ("llama", "sliding_window"),  # read by the code of all masks
        ("gpt_neox", "head_dim"),  # read by the model's own code
        ("gpt_neox", "rotary_pct"),  # a keyword argument of the config
        ("mixtral", "num_experts"),  # another name of a field
        ("stablelm", "qk_layernorm"),  # a field
    ],
)
def test_what_transformers_reads(name, field):
    assert field in read_by_transformers(name)


def test_many_such_fields_are_counted(tmp_path):
    (note,) = load_settings(write(tmp_path, **{f"odd_{n:02}": n for n in range(20)})).notes
    assert note.endswith("odd_10=10, odd_11=11 and 8 more")


def test_code_of_a_checkpoints_own_is_named_beside_what_only_it_may_read(tmp_path):
    own = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    (note,) = load_settings(write(tmp_path, "phi3", full_attn_mod=1, auto_map=own)).notes
    assert note.endswith("full_attn_mod=1; the checkpoint's own code (auto_map), which may, is not run")


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("llama", "attention_dropout"),
        ("stablelm", "hidden_dropout"),
        ("phi3", "embd_pdrop"),
        ("gpt_neox", "hidden_dropout_prob"),
    ],
)
def test_a_rate_of_dropout_is_a_note(tmp_path, name, rate):
    """Granite's code models, which are of type llama, have 0.1. Rates of 0 and those of heads for other tasks are not printed."""
    assert load_settings(write(tmp_path, name, **{rate: 0.2})).notes == (f"{DROPOUT_NOTE} {rate}=0.2",)
    assert load_settings(write(tmp_path, name, **{rate: 0.0, "classifier_dropout": 0.1})).notes == ()


@pytest.mark.parametrize("rate", [1.5, "0.1", True, float("nan")])
def test_what_is_no_rate_is_refused(tmp_path, rate):
    with pytest.raises(
        UserError, match=r"attention_dropout=.* is not a dropout rate \(0 or more and below 1\); correct it"
    ):
        load_settings(write(tmp_path, attention_dropout=rate))


def test_mpts_attention_too(tmp_path):
    """Fields that newer code of MPT adds to attn_config and does not use."""
    plain = load_settings(write(tmp_path / "plain", "mpt"))
    fields = tiny.FAMILIES["mpt"]["attn_config"] | {"rope": False, "sliding_window_size": 0}
    newer = load_settings(write(tmp_path / "newer", "mpt", attn_config=fields))
    assert newer == plain


VARIANTS = {
    "gemma-2-9b": (
        "gemma2",
        dict(sliding_window_size=4096, hidden_size=3584, num_hidden_layers=42),
        "sliding_window_size",
    ),
    "gemma-2-27b": (
        "gemma2",
        dict(sliding_window_size=4096, query_pre_attn_scalar=144, head_dim=128),
        "sliding_window_size",
    ),
    "Phi-4-mini": (
        "phi4",
        dict(full_attn_mod=1, interpolate_factor=1, mlp_bias=False, lm_head_bias=False, auto_map={"AutoConfig": "x"}),
        "full_attn_mod",
    ),
    "gpt2-medium": ("gpt2", dict(n_special=0, predict_special_tokens=True), "predict_special_tokens"),
    "distilgpt2": ("gpt2", dict(n_layer=6, _num_labels=1, output_past=True), "output_past"),
    "dolly-v2": ("pythia", dict(custom_pipelines=PIPELINES, num_hidden_layers=32), "custom_pipelines"),
    "falcon-11B": ("falcon40b", dict(ff_factor=4, num_kv_heads=8, ffn_hidden_size=16384), "ff_factor"),
    "granite-3b-code": (
        "llama2old",
        dict(attention_dropout=0.1, mlp_bias=True, attention_bias=True),
        "attention_dropout=0.1",
    ),
    "gpt2 of the first years": (
        "gpt2",
        dict(do_sample=False, num_beams=1, bad_words_ids=None, top_p=1.0),
        "num_beams=1",
    ),
}
"""Published models, by the fields that their config.json has and that of a related model does not."""


@pytest.mark.parametrize("name", VARIANTS)
def test_published_variants(tmp_path, name):
    sister, fields, said = VARIANTS[name]
    notes = load_settings(published(tmp_path, sister, **fields)).notes
    assert said in "; ".join(notes)
