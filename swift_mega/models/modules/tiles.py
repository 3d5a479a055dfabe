"""MLPs and norms of Megatron's layers, computed one tile of tokens at a time (ops/tiling.py): train.tile_mlp.

Tiled are dense MLPs, shared experts (which every token passes) and our norms. Routed experts are not: their tokens go to other ranks, and
data ranks with rows of different lengths would have different numbers of tiles, and so of collectives. Transformer Engine's norms are
not either, because their kernel keeps only its input and one number per token anyway.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import _fork_rng, _get_all_rng_states, _set_all_rng_states
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from swift_mega.config.schema import Train
from swift_mega.errors import UserError
from swift_mega.models.modules.norm import Norm
from swift_mega.models.settings import Settings
from swift_mega.ops.tiling import Again, tiled


class TiledMLP(MLP):
    """Megatron's dense MLP, `tile` tokens at a time. Megatron leaves its bias to the layer; here it is added to each tile."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        tile: int,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        **given: Any,
    ) -> None:
        group = parallel_state.get_tensor_model_parallel_group() if pg_collection is None else pg_collection.tp
        super().__init__(config, tp_group=group, **given)
        self.tile = tile

    def forward(self, hidden_states: Tensor, per_token_scale: None = None, **given: Any) -> tuple[Tensor, None]:
        """[tokens / s, 1, hidden] -> (the same, no bias)."""
        assert per_token_scale is None, "of routed experts"
        return _tiled(self, self._tile, hidden_states), None

    def _tile(self, x: Tensor) -> Tensor:
        out, bias = super().forward(x)
        return out if bias is None else out + bias


class TiledSharedExperts(SharedExpertMLP):
    """Megatron's shared experts, with their gate, `tile` tokens at a time."""

    def __init__(self, config: TransformerConfig, *, tile: int, **given: Any) -> None:
        super().__init__(config, **given)
        self.tile = tile

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[tokens / s, 1, hidden] -> the same."""
        return _tiled(self, super().forward, hidden_states)


class TiledNorm(Norm):
    """Our norm, `tile` tokens at a time."""

    def __init__(self, *args: Any, tile: int, **given: Any) -> None:
        super().__init__(*args, **given)
        self.tile = tile

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, ...] -> the same."""
        return tiled(super().forward, x, _trained(self), self.tile)


def _tiled(module: Any, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return tiled(call, x, _trained(module), module.tile, remember=_random_numbers)


def _trained(module: Any) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _random_numbers() -> Again:
    """Makes an adapter's dropout the same when a tile is recomputed: restores the tensor ranks' common random state and the rank's own."""
    *states, named = _get_all_rng_states()

    @contextmanager
    def again() -> Iterator[None]:
        with _fork_rng():
            _set_all_rng_states(*states, dict(named))  # a copy, because it keeps and changes this dict
            yield

    return again


REFUSED = {
    "fp8": "Transformer Engine counts the calls of an FP8 module for its scales",
    "fp4": "Transformer Engine counts the calls of an FP4 module for its scales",
    "tp_comm_overlap": "its buffers have the size of a whole row",
    "delay_wgrad_compute": "it keeps the inputs of one call of each linear",
    "moe_shared_expert_overlap": "it computes the shared experts in pieces between the steps of the dispatcher",
    "use_grouped_gemm_for_shared_expert": "it computes the shared experts in one kernel",
}
"""Fields of TransformerConfig that a tiled MLP would not obey, and why."""


def check_tiles(settings: Settings, train: Train, given: Mapping[str, Any]) -> str | None:
    """UserError where train.tile_mlp cannot take effect; else a line for the user about what is not tiled. given: model.megatron."""
    if not train.tile_mlp:
        return None
    for name, reason in REFUSED.items():
        if given.get(name):
            raise UserError(
                f"train.tile_mlp=true with model.megatron.{name}={given[name]}: {reason}; remove one of them"
            )
    if not any(settings.moe_layers):
        return None
    what = f"{sum(settings.moe_layers)} of {len(settings.moe_layers)} layers"
    if all(settings.moe_layers) and not settings.shape.shared_ffn:
        raise UserError(
            "train.tile_mlp=true: every MLP of this model is routed experts, whose tokens all go to other ranks in one step, so there is "
            "nothing to tile; set train.tile_mlp=false, and train.recompute=full to save memory"
        )
    return f"tile_mlp            not the routed experts of {what}: they send all tokens at once; train.recompute=full covers them"


def tile_size(train: Train, hidden: int) -> int | None:
    """Tokens of a rank in a tile; None: nothing is tiled."""
    return (train.mlp_tile_size or hidden) if train.tile_mlp else None
