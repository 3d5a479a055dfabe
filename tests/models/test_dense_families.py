"""What single dense families read from their configs, against numbers written out by hand, and what they refuse."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_mega.errors import UserError
from swift_mega.models.modules.attention import segments
from swift_mega.models.translate import load_settings
from tests import families_dense
from tests.models.test_families import close, plain, write


@pytest.mark.parametrize(
    ("name", "windows"),
    [("cohere2", (5, 5, None, 5)), ("exaone4", (5, 5, None, 5)), ("exaone4_full", (None,) * 4)],
)
def test_which_layers_see_a_window_and_rotate(tmp_path: Path, name: str, windows: tuple[int | None, ...]) -> None:
    """Where some layers have a window, only those rotate. EXAONE 4 without windows rotates in every layer."""
    settings = load_settings(write(tmp_path, name))
    rotated = tuple(window is not None for window in windows) if any(windows) else (True,) * 4
    assert settings.windows == windows
    assert tuple(rope is not None for rope in settings.ropes) == rotated


def test_hunyuans_alpha_stretches_the_base(tmp_path: Path) -> None:
    """The base is theta alpha^(d / (d - 2)), at every length. Without alpha, `dynamic` has its usual bound."""
    settings = load_settings(write(tmp_path / "a", "hunyuan"))
    close(settings.rope.inverse_frequencies, plain(1e4 * 50.0 ** (8 / 6)))
    assert settings.longest is None
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    bounded = load_settings(write(tmp_path / "b", "hunyuan", rope_parameters=dynamic))
    close(bounded.rope.inverse_frequencies, plain())
    assert bounded.longest == 256


def test_longrope_follows_the_length_of_each_example(tmp_path: Path) -> None:
    """A packed row of 12 and 13 tokens: up to 12 tokens the short factors, beyond them the long factors, for every token of the example.

    Both tables have the factor sqrt(1 + ln(256 / 12) / ln 12), from the model's length and the length before its extension.
    """
    settings = load_settings(write(tmp_path, "phi3_longrope"))
    positions = torch.cat([torch.arange(12), torch.arange(13)])
    row = segments(settings, positions, torch.tensor([0, 12, 25], dtype=torch.int32), torch.float32)
    ((cos, sin),) = row.rope_tables
    scale = math.sqrt(1 + math.log(256 / 12) / math.log(12))
    assert cos.shape == sin.shape == (25, 1, 2)
    for token, position, factors in (
        (3, 3, (1.0, 1.5)),
        (11, 11, (1.0, 1.5)),
        (15, 3, (2.0, 6.0)),
        (24, 12, (2.0, 6.0)),
    ):
        for turn, factor in enumerate(factors):
            angle = position * 1e4 ** (-turn / 2) / factor
            assert cos[token, 0, turn].item() == pytest.approx(scale * math.cos(angle), abs=1e-6)
            assert sin[token, 0, turn].item() == pytest.approx(scale * math.sin(angle), abs=1e-6)


def test_ministrals_queries_grow_with_their_position(tmp_path: Path) -> None:
    """The factor is 1 + 0.3 ln(1 + floor(p / 8)), with p from each example's own positions."""
    settings = load_settings(write(tmp_path, "ministral3"))
    positions = torch.tensor([0, 7, 8, 15, 16, 0])
    row = segments(settings, positions, torch.tensor([0, 5, 6], dtype=torch.int32), torch.float64)
    expected = [1 + 0.3 * math.log(1 + n) for n in (0, 0, 1, 1, 2, 0)]
    assert row.growth is not None and row.growth.flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_olmos_epsilon_is_no_field(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, "olmo")).megatron["layernorm_epsilon"] == 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cohere", dict(logit_scale=None), "logit_scale=None is not a number"),
        ("cohere2", dict(use_qk_norm=True), "use_qk_norm=True is not supported for family cohere2; supported: False"),
        ("cohere2", dict(rotary_pct=0.5), "rotary_pct=0.5 is not supported"),
        ("exaone4", dict(layer_types=None, sliding_window_pattern="LLLG"), "transformers cannot read"),
        ("helium", dict(head_dim=16), "num_attention_heads=8 times head_dim=16 is not hidden_size=64; correct one"),
        ("hunyuan", dict(attention_head_dim=16), "attention_head_dim=16 is not head_dim=8; correct one"),
        ("hunyuan", dict(use_cla=True), "use_cla=True is not supported"),
        ("internlm3", dict(qkv_bias=True), "cannot read .* `qkv_bias` different from `bias`"),
        ("apertus", dict(post_norm=True), "post_norm=True is not supported"),
        ("phi", dict(head_dim=16), "head_dim=16, but hidden_size / num_attention_heads is 8; delete head_dim"),
        (
            "phi3_longrope",
            dict(rope_parameters={**families_dense.LONGROPE, "short_mscale": 1.1}),
            "short_mscale of rope_type longrope is not supported",
        ),
        (
            "ministral3",
            dict(rope_parameters={**families_dense.YARN, "llama_4_scaling_beta": None}),
            "llama_4_scaling_beta=None and original_max_position_embeddings=8",
        ),
        (
            "ministral3",
            dict(layer_types=["full_attention"] * 4),
            "fields that family ministral3 does not know: layer_types",
        ),
        ("arcee", dict(hidden_act="silu"), "hidden_act='silu' is not supported for family arcee; supported: 'relu2'"),
    ],
)
def test_what_a_family_does_not_compute_stops_the_run(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_settings(write(tmp_path, name, **changes))


def test_dropout_that_a_config_names_is_said(tmp_path: Path) -> None:
    """One line with every rate; no line where there is none."""
    named = write(tmp_path / "a", "starcoder2", attention_dropout=0.1, residual_dropout=0.2)
    assert load_settings(named).notes == (
        "training uses no dropout but that of an adapter and model.megatron.hidden_dropout; not used from config.json: "
        "attention_dropout=0.1, residual_dropout=0.2",
    )
    assert load_settings(write(tmp_path / "b", "starcoder2")).notes == ()
    assert "resid_pdrop=0.1" in load_settings(write(tmp_path / "d", "phi", resid_pdrop=0.1)).notes[0]
