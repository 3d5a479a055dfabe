"""Next-token cross-entropy over the trained tokens: pretraining and supervised fine-tuning."""

from torch import Tensor

from swift_mega.data.pack import Microbatch
from swift_mega.models.build import Decoder
from swift_mega.objectives.objective import Head, Loss


class NextToken:
    """Minus the mean log-probability of the labels, over the trained tokens."""

    def loss(self, head: Head, chunk: Decoder, hidden: Tensor, batch: Microbatch) -> Loss:
        labels = batch.labels
        return Loss(-head.log_probabilities(chunk, hidden, labels).sum(), (labels >= 0).sum())


OBJECTIVE = NextToken()
