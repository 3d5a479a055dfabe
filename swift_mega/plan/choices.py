"""What a run chooses that decides its memory, apart from model and layout."""

from dataclasses import dataclass
from typing import Literal

from swift_mega.config.schema import Run

MEBI = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The settings of a run that memory depends on; defaults are those of the run's own settings."""

    device: Literal["cpu", "cuda"] = "cuda"
    itemsize: int = 2
    """Bytes of a number of weights and activations: 2 for bfloat16, 4 for float32."""
    rank: int | None = None
    """Of LoRA on all linears; None: every parameter is trained."""
    distributed_optimizer: bool = True
    recompute: Literal["none", "full"] = "none"
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_layers: int = 1
    tile: int | None = None
    """Tokens of a tile of MLPs and norms; None: they take all at once."""
    loss_chunk: int | None = None
    """Tokens whose logits exist at once; None: as many as fit 128 MiB."""
    whole_loss: bool = False
    """All logits exist at once, whatever loss_chunk: what frameworks do that hand logits to a loss."""
    offload_activations: bool = False
    offload_fraction: float = 0.0
    """Share of the optimizer's state in host memory."""
    fused_activation: bool = False
    """model.megatron.bias_activation_fusion: gate and up are multiplied in one kernel, which keeps neither."""
    microbatches: int = 1
    """Rows of one data-parallel rank in a step; pipeline stages hold several at once."""
    longest: int | None = None
    """Tokens of the longest example of a row; None: the row is one. It matters on the CPU only."""


def choices_of(run: Run, *, device: Literal["cpu", "cuda"] = "cuda", microbatches: int = 1) -> Choices:
    """The choices of a run. recompute=selective has no formula and counts as none: the bytes are then an upper bound."""
    wide = run.model.dtype == "float32" or (run.model.dtype == "auto" and device == "cpu")
    return Choices(
        device=device, itemsize=8 if run.model.dtype == "float64" else 4 if wide else 2,
        rank=run.tuner.rank if run.tuner.type == "lora" else None, distributed_optimizer=run.parallel.distributed_optimizer,
        recompute="full" if run.train.recompute == "full" else "none", recompute_method=run.train.recompute_method,
        recompute_layers=run.train.recompute_layers, fused_activation=bool(run.model.megatron.get("bias_activation_fusion")),
        microbatches=microbatches,
    )  # fmt: skip
