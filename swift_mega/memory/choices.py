"""The settings of a run that its memory depends on, apart from model and layout."""

from dataclasses import dataclass
from typing import Literal

from swift_mega.config.schema import Full, Lora, Run
from swift_mega.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The settings of a run that its memory depends on; the defaults are those of config/schema.py."""

    device: Literal["cpu", "cuda"] = "cuda"
    itemsize: int = 2
    """Bytes per number of weights and activations: 2 for bfloat16, 4 for float32."""
    rank: int | None = None
    """The rank of LoRA; None: every parameter is trained."""
    adapted: tuple[tuple[str, ...], ...] | None = None
    """For each layer, the linears with LoRA, in the names of PARTS in memory/weights.py; None: all linears of all layers."""
    vocab_divisible_by: int = 128
    distributed_optimizer: bool = True
    gradients_in_float32: bool = True
    """Whether gradients are summed in float32; false: in the dtype of the weights."""
    recompute: Literal["none", "full"] = "none"
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_layers: int = 1
    tile: int | None = None
    """Tokens per tile of MLPs and norms; None: no tiles, all tokens at once."""
    loss_chunk: int | None = None
    """Tokens whose logits are in memory at once; None: as many as fit 128 MiB."""
    whole_loss: bool = False
    """All logits are in memory at once, regardless of loss_chunk, as in frameworks that pass logits to a loss function."""
    offload_activations: bool = False
    offload_fraction: float = 0.0
    """Fraction of the optimizer state in host memory, 0 to 1."""
    fused_activation: bool | None = None
    """model.megatron.bias_activation_fusion: act(gate) * up is one kernel, which does not save act(gate). None: the default of
    training on a machine with a compiler."""
    microbatches: int = 1
    """Microbatches of one data-parallel rank in a step; a pipeline stage holds activations of several at once."""
    longest: int | None = None
    """Tokens of the longest example in a packed row; None: the row is one example. It matters on the CPU only."""


def choices_of(
    run: Run,
    *,
    hidden: int,
    device: Literal["cpu", "cuda"] = "cuda",
    microbatches: int = 1,
    longest: int | None = None,
    adapted: tuple[tuple[str, ...], ...] | None = None,
) -> Choices:
    """The choices of a run. hidden: hidden size of the model. adapted: the field of Choices.

    UserError for train.recompute=selective, reference kernels and Transformer Engine's context parallelism, which have no formula.
    """
    train, optim, tuner = run.train, run.optim, run.tuner
    if not isinstance(tuner, Lora | Full):
        raise UserError(
            f"tuner.type={tuner.type} has no memory formula; estimate with lora, or with full as an upper limit"
        )
    if run.objective.name != "next_token":
        raise UserError(
            f"objective.name={run.objective.name} has no memory formula; estimate with next_token, and add what it needs"
        )
    if train.recompute == "selective":
        raise UserError("train.recompute=selective has no memory formula; estimate with none or full")
    if "reference" in (train.kernels, *train.kernels_by_op.values()):
        raise UserError("train.kernels=reference has no memory formula; estimate with auto or fused")
    if run.parallel.cp.startswith("te:"):
        raise UserError(
            f"parallel.cp={run.parallel.cp} has no memory formula, which is for our own attention only; estimate with auto"
        )
    return Choices(
        device=device,
        itemsize=_itemsize(run, device),
        rank=tuner.rank if isinstance(tuner, Lora) else None,
        adapted=adapted if isinstance(tuner, Lora) else None,
        vocab_divisible_by=run.model.vocab_divisible_by,
        distributed_optimizer=run.parallel.distributed_optimizer,
        gradients_in_float32=run.parallel.gradients_in_float32,
        recompute=train.recompute,
        recompute_method=train.recompute_method,
        recompute_layers=train.recompute_layers,
        tile=(train.mlp_tile_size or hidden) if train.tile_mlp else None,
        loss_chunk=train.loss_chunk_size,
        offload_activations=train.offload_activations,
        offload_fraction=optim.offload_fraction if optim.cpu_offload else 0.0,
        fused_activation=run.model.megatron.get("bias_activation_fusion"),
        microbatches=microbatches,
        longest=longest,
    )


def _itemsize(run: Run, device: str) -> int:
    dtype = run.model.dtype if run.model.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    return {"bfloat16": 2, "float32": 4, "float64": 8}[dtype]
