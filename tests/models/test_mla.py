"""What latent attention does not support is one error that names the value, before anything is built."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import tiny
from swift_mega.errors import UserError
from swift_mega.models.modules.mla import refuse_without_effect
from swift_mega.models.settings import Settings
from swift_mega.models.translate import load_settings
from swift_mega.parallel.layout import Layout


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    made = tiny.make(tmp_path_factory.mktemp("mla"), "deepseek_v3_moe")
    return json.loads((made / "config.json").read_text())


def write(directory: Path, config: dict[str, object], **changes: object) -> Path:
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads=4"),
        ({"head_dim": 6}, "head_dim=6"),
        ({"n_group": 3}, "split into 3 groups"),
        ({"topk_group": 5}, "of 5 groups"),
        ({"num_experts_per_tok": 5}, "5 experts of 2 groups"),
        ({"n_group": 8, "topk_group": 8}, "split into 8 groups"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_configs(tmp_path: Path, config: dict[str, object], changes: dict[str, object], said: str) -> None:
    load_settings(write(tmp_path, config))
    with pytest.raises(UserError) as caught:
        load_settings(write(tmp_path, config, **changes))
    assert said in str(caught.value)


def check(settings: Settings, tensor: int) -> None:
    for edit in settings.edits:
        edit.check_layout(Layout(world=tensor, layers=(settings.shape.layers,), tensor=tensor))


def test_tensor_ranks_that_do_not_divide_the_latents(tmp_path: Path, config: dict[str, object]) -> None:
    """12 query and 16 + 4 key features: 4 divides both, 8 neither, 5 only the second."""
    settings = load_settings(write(tmp_path, config))
    check(settings, 4)
    with pytest.raises(UserError, match=r"parallel\.tensor=8 does not divide q_lora_rank=12"):
        check(settings, 8)
    settings = load_settings(write(tmp_path, config, q_lora_rank=None))
    with pytest.raises(UserError, match=r"kv_lora_rank \+ qk_rope_head_dim=20"):
        check(settings, 8)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"cache_mla_latents": True}, "cache_mla_latents"),
        ({"apply_rope_fusion": True}, "apply_rope_fusion"),
        ({"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]}, "recompute_modules=mla_up_proj"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_without_effect(fields: dict[str, object], said: str) -> None:
    plain = {"recompute_granularity": None, "recompute_modules": None}
    refuse_without_effect(SimpleNamespace(**plain))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=said):
        refuse_without_effect(SimpleNamespace(**{**plain, **fields}))  # type: ignore[arg-type]
