"""The memory estimate that `swift-mega plan` prints: the memory of the fullest rank by parts, and the longest row that fits."""

from dataclasses import dataclass

from swift_mega.config.schema import Run
from swift_mega.memory.choices import choices_of
from swift_mega.memory.memory import Memory, longest, memory
from swift_mega.models.settings import Settings
from swift_mega.parallel.layout import Layout

RESERVE = 4 << 30
"""Bytes of a GPU for CUDA's context, NCCL's buffers, library workspaces and fragmentation: a guess, not measured."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """The memory estimate of a run's fullest rank."""

    layout: Layout
    tokens: int
    memory: Memory
    gpu_bytes: int
    longest: int
    """Most tokens of a row that fit; 0: not even weights and optimizer state fit."""

    @property
    def fits(self) -> bool:
        return self.tokens <= self.longest

    def table(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        needed = {name: value for name, value in self.memory.parts.items() if name != "host"}
        rows = [
            *((name, value, "") for name, value in needed.items()),
            ("reserve", RESERVE, "CUDA, NCCL, libraries, fragmentation: a guess"),
            ("together", self.memory.total + RESERVE, f"of {self.gpu_bytes / 2**30:.2f}: {verdict}"),
            ("host", self.memory.host, "of each rank"),
        ]
        lines = [f"{name:10} {value / 2**30:8.2f} GiB  {note}".rstrip() for name, value, note in rows]
        lines += [
            f"rows of {self.tokens} tokens in layout {self.layout.name}; the peak is {PEAKS[self.memory.moment]}",
            f"longest row that fits: {self.longest} tokens",
            "by a formula that was measured on the CPU and not on a GPU (docs/long_context.md)",
        ]
        return "\n".join(lines)


PEAKS = {"loss": "at the loss", "mlp": "in the MLP's backward pass", "attention": "in attention's backward pass"}


def plan_run(
    run: Run,
    settings: Settings,
    layout: Layout,
    *,
    gpu_bytes: int,
    host_bytes: int | None,
    adapted: tuple[tuple[str, ...], ...] | None = None,
) -> MemoryEstimate:
    """The estimate for rows of train.micro_batch_size * data.max_length tokens on CUDA.

    gpu_bytes, host_bytes: memory of one rank; host_bytes None: unlimited. adapted: the field of Choices.
    """
    train = run.train
    tokens = -(-train.micro_batch_size * run.data.max_length // layout.row_multiple) * layout.row_multiple
    microbatches = max(1, train.global_batch_size // (train.micro_batch_size * layout.data))
    choices = choices_of(run, hidden=settings.shape.hidden, microbatches=microbatches, adapted=adapted)
    most = longest(settings, layout, choices, device_bytes=max(0, gpu_bytes - RESERVE), host_bytes=host_bytes)
    return MemoryEstimate(
        layout=layout,
        tokens=tokens,
        memory=memory(settings, layout, choices, tokens),
        gpu_bytes=gpu_bytes,
        longest=most,
    )
