"""Next-token cross-entropy over the trained tokens: pretraining and supervised fine-tuning."""

from swift_mega.data.pack import Microbatch
from swift_mega.objectives.objective import Loss, Objective, Output


class NextToken(Objective):
    """Minus the mean log-probability of the labels, over the trained tokens."""

    def weight(self, batch: Microbatch) -> float:
        return batch.targets

    def loss(self, output: Output) -> Loss:
        return Loss(-output.log_probabilities().sum())


OBJECTIVE = NextToken
