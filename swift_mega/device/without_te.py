"""Patches for what Megatron-core does wrong where Transformer Engine is absent, also on CUDA."""

import functools

from swift_mega.device.backends import transformer_engine
from swift_mega.device.many_tensors import in_place_of, l2_norm, scale
from swift_mega.device.patch import Patch, replaced_by

# Line numbers are those of Megatron-core 0.16.1. 0.19 has none of the first three faults, and their patches change nothing there.
WITHOUT_TE = (
    Patch(
        name="MoE router",
        reason="0.16.1 does not define this name without Transformer Engine, moe_utils.py:1192",
        targets={"megatron.core.transformer.moe.moe_utils:te_general_gemm?": replaced_by(None)},
    ),
    Patch(
        name="latent attention",
        reason="takes Transformer Engine as present where it is absent, and calls isinstance(…, None), multi_latent_attention.py:185",
        targets={"megatron.core.transformer.multi_latent_attention:HAVE_TE": replaced_by(False)},
    ),
    Patch(
        name="optimizer precision",
        reason="compares the version of an absent Transformer Engine with 2.1 (TypeError), optimizer/optimizer_config.py:383",
        targets={
            "megatron.core.optimizer.optimizer_config:is_te_min_version": replaced_by(lambda *args, **options: False)
        },
    ),
    Patch(
        name="gradient norm",
        reason="the host reads the norm of each parameter's gradient where Apex is absent too, utils.py:1205",
        targets={
            "megatron.core.optimizer.clip_grads:l2_norm_impl": in_place_of("local_multi_tensor_l2_norm", l2_norm),
            "megatron.core.optimizer.clip_grads:multi_tensor_scale_impl": in_place_of(
                "local_multi_tensor_scale", scale
            ),
        },
    ),
)


@functools.cache
def install() -> None:
    """Installs the patches where Transformer Engine cannot be used. Later calls are free."""
    if transformer_engine().version is None:
        for patch in WITHOUT_TE:
            patch.install()
