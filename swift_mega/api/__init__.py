"""What swift_mega does, as functions: the same ones that the command line calls.

They start their ranks themselves, or join those that torchrun started; a notebook needs to know nothing of torch.distributed.
Everything that can be checked before a rank starts is checked before.
"""

from swift_mega.device import device as devices

devices.setup(starts_ranks=True)  # before Megatron is imported by anything below

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
