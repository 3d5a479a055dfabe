"""Which ops of the registry (ops/kernels.py) a model runs, for the check of train.kernels and for the header of a run.

Only our own modules ask the registry. Layers of Transformer Engine have its norms, and its attention over context ranks (parallel.cp=te:…)
is its own too.
"""

import torch

from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.models.settings import Settings
from swift_mega.models.specs import has_te_norm
from swift_mega.ops.attention import ATTENTION, AttentionCase
from swift_mega.ops.blocks import BLOCKS, BlocksCase
from swift_mega.ops.kernels import Kernels, Use
from swift_mega.ops.rmsnorm import RMS_NORM
from swift_mega.ops.rope import ROPE
from swift_mega.parallel.mesh import Mesh
from swift_mega.parallel.vocab import CROSS_ENTROPY


def te_layers(device: Device, dtype: torch.dtype, kernels: Kernels) -> bool:
    """Whether layers are Transformer Engine's. train.kernels=reference runs Megatron's local modules, which are plain torch."""
    return kernels.asked != "reference" and device.uses_transformer_engine(dtype)


def uses(settings: Settings, mesh: Mesh, *, te: bool) -> list[Use]:
    """The ops that training this model runs. te: whether layers are Transformer Engine's."""
    found: list[Use] = []
    kinds = set(settings.layer_kinds)
    if not all(any(edit.replaces_attention for edit in kind.edits) for kind in kinds):
        found += _attention(settings, mesh)
    own_norm = any(edit.own_norm for edit in settings.edits) or not (te and has_te_norm(settings))
    if settings.norm.kind == "rms" and settings.norm.weight and own_norm:
        found.append(Use(RMS_NORM, True))
    found += dict.fromkeys(use for kind in kinds for edit in kind.edits for use in edit.ops())
    return [*found, Use(CROSS_ENTROPY)]


def _attention(settings: Settings, mesh: Mesh) -> list[Use]:
    rotation = [Use(ROPE)] if settings.rope is not None else []
    if mesh.te:
        return rotation
    given, softcap = settings.megatron, settings.scales.attention_softcap is not None
    latent = given.get("multi_latent_attention")
    head_dim = given["qk_head_dim"] + given["qk_pos_emb_head_dim"] if latent else given["kv_channels"]
    if mesh.ring > 1:
        return [Use(BLOCKS, BlocksCase(head_dim, softcap)), *rotation]
    case = AttentionCase(
        head_dim,
        softcap=softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **{name: value for edit in settings.edits for name, value in edit.attention_case.items()},
    )
    return [Use(ATTENTION, case), *rotation]


def check_kernels(
    kernels: Kernels, settings: Settings, mesh: Mesh, device: Device, dtype: torch.dtype, *, touch: bool = True
) -> None:
    """UserError where an op of this model does not have the form that is asked for. touch: whether the GPU may be used to find out."""
    if kernels.asked == "reference" and mesh.te:
        raise UserError(
            f"train.kernels=reference computes attention in torch, but parallel.cp={mesh.name} asks for Transformer Engine's; "
            "set parallel.cp=auto, or train.kernels=auto"
        )
    te = te_layers(device, dtype, kernels)
    kernels.check(uses(settings, mesh, te=te), device.device if touch else None, dtype)
