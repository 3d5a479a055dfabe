"""The report on data rows: every row becomes an example or is counted as dropped. Printed as a table."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class SplitReport:
    """Counts of one split. dropped, truncated: data rows. packed_rows: packed rows of at most max_length tokens, 0 without packing.

    also_trained: validation rows that have the same text as a training row.
    """

    conversations: int = 0
    documents: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    examples: int = 0
    tokens: int = 0
    targets: int = 0
    longest: int = 0
    packed_rows: int = 0
    also_trained: int = 0
    max_length: int = 0

    @property
    def rows(self) -> int:
        """Data rows that were read, including dropped ones."""
        return self.conversations + self.documents

    @property
    def packing_efficiency(self) -> float:
        """Tokens / (packed_rows · max_length); 1.0 without packing, where nothing is padded."""
        return self.tokens / (self.packed_rows * self.max_length) if self.packed_rows else 1.0


@dataclass(kw_only=True)
class Report:
    """Counts of a run's data. ignored: column -> number of rows in which it was not used."""

    train: SplitReport
    validation: SplitReport
    ignored: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        splits = (self.train, self.validation)
        lines: list[tuple[str, str, str]] = [("data", "train", "validation"), _line("rows", [s.rows for s in splits])]
        if any(s.documents for s in splits):
            lines.append(_line("  of plain text", [s.documents for s in splits]))
        if any(s.also_trained for s in splits):
            lines.append(("  equal to a trained row", "", f"{self.validation.also_trained:,}"))
        for reason in sorted({reason for s in splits for reason in s.dropped}):
            lines.append(_line(f"  dropped: {reason}", [s.dropped[reason] for s in splits]))
        if any(s.truncated for s in splits):
            lines.append(_line("  truncated", [s.truncated for s in splits]))
        lines.append(_line("examples", [s.examples for s in splits]))
        lines.append(_line("tokens", [s.tokens for s in splits]))
        lines.append(_line("  with loss", [s.targets for s in splits]))
        lines.append(_line("longest example", [s.longest for s in splits]))
        if any(s.packed_rows for s in splits):
            lines.append(_line(f"packed rows of {self.train.max_length}", [s.packed_rows for s in splits]))
            first, second = (f"{s.packing_efficiency:.1%}" if s.packed_rows else "-" for s in splits)
            lines.append(("  filled", first, second))
        for name, rows in sorted(self.ignored.items()):
            lines.append((f"unused column {name}", f"{rows:,} rows", ""))
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in lines)


def _line(name: str, counts: list[int]) -> tuple[str, str, str]:
    first, second = (f"{count:,}" for count in counts)
    return name, first, second
