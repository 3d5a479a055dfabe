"""Steps the MLPs' matrices by SGD with momentum and the rest by AdamW: a tuner outside the package with an optimizer of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swift_mega.config import schema
from swift_mega.models.build import NamedParameter
from swift_mega.tuners.full import Full


@dataclass(frozen=True, kw_only=True)
class MomentumSettings(schema.Tuner):
    """Which parameters are trained."""

    type: str = "toys.momentum"
    momentum: float = schema.setting(0.9, flag="momentum", help="of the matrices", limit=schema.PROBABILITY)


class Momentum(Full):
    Settings = MomentumSettings
    settings: MomentumSettings
    own_optimizer = True

    def owns(self, named: NamedParameter) -> bool:
        return ".mlp.linear_" in named.name

    def optimizer(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        assert all(self.owns(group["named"]) for group in groups)
        return torch.optim.SGD(groups, momentum=self.settings.momentum)


TUNER = Momentum
