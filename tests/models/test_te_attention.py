"""Transformer Engine's attention over context ranks: which models and machines are refused, and which arguments Megatron gets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

import tiny
from swift_mega import api
from swift_mega.api.comparison import Candidate
from swift_mega.config.schema import Parallel, Train
from swift_mega.device import device as devices
from swift_mega.device.backends import Package
from swift_mega.device.device import CPU, Device
from swift_mega.errors import UserError
from swift_mega.models import specs
from swift_mega.models.build import build
from swift_mega.models.family import family_of
from swift_mega.models.megatron_config import transformer_config
from swift_mega.models.modules import te_attention
from swift_mega.models.modules.te_attention import check_te_runs, make_te_attention
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.parallel.mesh import Mesh
from tests.te_stand_in import StandIn

CUDA = Device(kind="cuda", device=CPU, backend="gloo", name="as if")
P2P, A2A, ALL, BOTH = (Mesh(*sizes, te=True) for sizes in ((1, 4), (4, 1), (1, 4, True), (2, 2)))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt_oss", "has attention sinks"),
        ("gemma2", "has soft-capped scores"),
        ("deepseek_v3_moe", "has latent attention"),
        ("phi3_longrope", "rotates tokens by the length of their example"),
        ("qwen3_next", "has gated delta nets"),
        ("bloom", r"adds biases to scores by position \(ALiBi\)"),
        ("mistral", "has sliding windows"),
    ],
)
def test_models_that_it_cannot_do(tmp_path: Path, family: str, reason: str) -> None:
    shape = load_settings(tiny.make(tmp_path, family)).shape
    with pytest.raises(UserError, match=reason):
        plan_layout(Parallel(context=2, cp="te:p2p"), shape, 2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral", "cohere", "olmo2", "gemma"])
def test_models_that_it_can(tmp_path: Path, family: str) -> None:
    shape = load_settings(tiny.make(tmp_path, family)).shape
    assert shape.no_te_context is None and not shape.windows
    assert plan_layout(Parallel(context=2, cp="te:p2p"), shape, 2).mesh == Mesh(1, 2, te=True)


@pytest.mark.parametrize(
    ("mesh", "device", "dtype", "version", "message"),
    [
        (P2P, "cpu", torch.bfloat16, "2.20.2", "parallel.cp=te:p2p needs CUDA and Transformer Engine, and ranks run on the CPU here; "
         "parallel.cp=auto does the same on any device"),
        (A2A, "cuda", torch.bfloat16, None, "parallel.cp=te:a2a needs Transformer Engine, which is not installed; parallel.cp=auto"),
        (P2P, "cuda", torch.bfloat16, "1.13.0", "te:p2p needs Transformer Engine 2.0 for rows of many examples, and 1.13.0 is installed"),
        (A2A, "cuda", torch.bfloat16, "2.10.1", "te:a2a needs Transformer Engine 2.11 "),
        (ALL, "cuda", torch.bfloat16, "2.9.0", "te:allgather needs Transformer Engine 2.18 "),
        (BOTH, "cuda", torch.bfloat16, "2.18.0", r"te:a2a2\+p2p needs Transformer Engine 2.19 "),
        (P2P, "cuda", torch.float32, "2.20.2", "te:p2p computes in bfloat16 or float16, and the model is in float32; set model.dtype=bf"),
        (P2P, "cuda", torch.bfloat16, "2.20.2+abc", None),
        (BOTH, "cuda", torch.float16, "2.20.0.dev0", None),
        (Mesh(2, 2), "cpu", torch.float64, None, None),
    ],
)  # fmt: skip
def test_machines(
    monkeypatch: pytest.MonkeyPatch,
    cpu: Device,
    mesh: Mesh,
    device: str,
    dtype: torch.dtype,
    version: str | None,
    message: str | None,
) -> None:
    for module in (devices, te_attention):
        monkeypatch.setattr(module, "transformer_engine", lambda: Package(name="Transformer Engine", version=version))
    where = CUDA if device == "cuda" else cpu
    if message is None:
        return check_te_runs(mesh, where, dtype)
    with pytest.raises(UserError, match=message):
        check_te_runs(mesh, where, dtype)


def test_verify_and_compare_refuse_it_here(tmp_path: Path) -> None:
    model = str(tiny.make(tmp_path, "llama"))
    with pytest.raises(
        UserError, match=r"parallel.cp=te:a2a needs CUDA and Transformer Engine, and ranks run on the CPU"
    ):
        api.verify(model, ["cp2-te:a2a"])
    with pytest.raises(UserError, match=r"parallel.cp=te:p2p needs CUDA"):
        api.compare(Candidate(checkpoint=model, layout="cp2-te:p2p"), Candidate(checkpoint=model))


@pytest.mark.parametrize("window", [None, 6])
def test_a_layer_has_its_own_window(window: int | None) -> None:
    """The model's config, which other layers read too, is not changed."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        use_cpu_initialization=True,
        context_parallel_size=2,
        window_size=(3, 3),
        tensor_model_parallel_size=1,
        cp_comm_type="a2a",
        window_attn_skip_freq=2,
    )
    made: Any = make_te_attention(StandIn, config, 3, communication="a2a", scale=0.5, window=window)
    assert (made.window, made.scale) == (window, 0.5)
    assert config.window_size == (3, 3) and config.window_attn_skip_freq == 2


def _made(model: Path, name: str, device: Device) -> tuple[int, int]:
    """The number of entries of the state, and of checkpoints, that belong to it. Collective."""
    parallel, world = parse_layout(name)
    settings = load_settings(model)
    layout = plan_layout(parallel, settings.shape, world)
    groups = parallel_groups.init(layout)
    config = transformer_config(settings, layout, device=device, dtype=torch.float32, train=Train(), given={})
    part = build(family_of(model), settings, layout, groups.coordinate, device=device, config=config)
    about = {"dp_cp_group": groups.data_context, "singleton_local_shards": False}
    saved = part.chunks[0].sharded_state_dict(metadata=about)
    parallel_groups.close()
    return sum("te_attention" in name for name in part.chunks[0].state_dict()), sum(
        "te_attention" in name or "te_attention" in value.key for name, value in saved.items()
    )


def test_checkpoints_do_not_know_of_it(
    tmp_path: Path, cpu: Device, ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its modules have a state beside the parameters. In a checkpoint, no other layout could read it."""
    monkeypatch.setattr(specs, "te_attention", lambda te: StandIn)
    model = tiny.make(tmp_path, "llama")
    assert ranks(2, _made, model, "cp2-te:p2p", cpu) == (load_settings(model).shape.layers, 0)
    assert ranks(2, _made, model, "cp2-ring", cpu) == (0, 0)
