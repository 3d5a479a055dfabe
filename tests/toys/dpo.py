"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290), as an objective outside the package."""

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from swift_mega.config import schema
from swift_mega.data.pack import Microbatch
from swift_mega.objectives.objective import Loss, Objective, Output, Pass


@dataclass(frozen=True, kw_only=True)
class DpoSettings(schema.Objective):
    """What is minimised."""

    name: str = "toys.dpo"
    beta: float = schema.setting(0.1, flag="beta", help="strength of the reference", limit=schema.ABOVE_0)


class Dpo(Objective):
    """-log sigmoid(beta * (log ratio of the preferred reply - log ratio of the rejected one)), the mean over pairs."""

    Settings = DpoSettings
    settings: DpoSettings
    fields = ("rejected_response",)
    metrics = ("rewards/accuracies", "rewards/margins", "logps/reference")

    def passes(self) -> tuple[Pass, ...]:
        return (Pass("reference", Output.example_log_probabilities),)

    def weight(self, batch: Microbatch) -> float:
        return batch.examples / 2

    def loss(self, output: Output) -> Loss:
        reference = output.passes["reference"]
        rewards = self.settings.beta * (output.example_log_probabilities() - reference)
        margins = rewards[0::2] - rewards[1::2]
        metrics = dict(zip(self.metrics, ((margins > 0).sum(), margins.sum(), reference[0::2].sum()), strict=True))
        return Loss(-logsigmoid(margins).sum(), metrics, by_example=True)


OBJECTIVE = Dpo
