"""swift_mega as Python functions; the command line calls the same functions.

A function starts its ranks itself, or joins the ranks that torchrun started, so a notebook needs no code for torch.distributed.
Everything that can be checked before ranks start is checked before.
"""

from swift_mega.device import device as devices

# Has to run before an import below imports Megatron.
devices.setup(starts_ranks=True)

from swift_mega.api.answers import Answerer, infer  # noqa: E402
from swift_mega.api.comparison import Candidate, compare  # noqa: E402
from swift_mega.api.conversion import convert, export, plan, quantize  # noqa: E402
from swift_mega.api.memory import plan_memory  # noqa: E402
from swift_mega.api.proof import Report, verify  # noqa: E402
from swift_mega.api.training import load_recipe, train  # noqa: E402
from swift_mega.config.schema import Parallel  # noqa: E402
from swift_mega.train.loop import TrainResult  # noqa: E402
from swift_mega.verify.distance import Comparison  # noqa: E402

__all__ = [
    "Answerer", "Candidate", "Comparison", "Parallel", "Report", "TrainResult", "compare", "convert", "export", "infer", "load_recipe",
    "plan", "plan_memory", "quantize", "train", "verify",
]  # fmt: skip
