"""The memory estimate of a run; needs no GPU."""

from swift_mega.api.ready import DEVICE  # noqa: F401 - before Megatron
from swift_mega.config import schema
from swift_mega.convert.source import Source
from swift_mega.memory.report import MemoryEstimate, plan_run
from swift_mega.parallel.layout import plan_layout
from swift_mega.train.build import parameter_dtype
from swift_mega.train.preflight import check_run
from swift_mega.tuners.tuner import find_tuner


def plan_memory(run: schema.Run, *, ranks: int, gpu_bytes: int, host_bytes: int | None) -> MemoryEstimate:
    """Does what `api.plan_memory` says."""
    assert run.model.path is not None
    source = Source(run.model.path, dequantize=run.model.dequantize, names=())
    settings, family = source.settings, source.family
    layout = plan_layout(run.parallel, settings.shape, ranks)
    check_run(run, family, settings, parameter_dtype(run.model, "cuda"))
    adapted = find_tuner(run.tuner).adapted_linears(family, settings)
    return plan_run(run, settings, layout, gpu_bytes=gpu_bytes, host_bytes=host_bytes, adapted=adapted)
