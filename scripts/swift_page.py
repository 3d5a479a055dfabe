"""Makes docs/swift_flags.md, the table of Megatron-SWIFT's flags: `python scripts/swift_page.py` writes it, `--check` only compares."""

import argparse
from pathlib import Path

from swift_mega.config.peers import ANY, PEERS
from swift_mega.config.tree import settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "swift_flags.md"
HEAD = """# Flags of Megatron-SWIFT

Made by `python scripts/swift_page.py` from `swift_mega/config/schema.py` and `swift_mega/config/peers.py`.

`swift-mega megatron sft …` is `swift-mega sft …`, so that a script of Megatron-SWIFT runs after its first word is changed. A flag is one
of our settings, or it is accepted with a line that says why it has no effect, or it is refused with the feature that is missing. In a
recipe (YAML) the same names are keys.
"""


def page() -> str:
    """The page's text."""
    lines = [HEAD, "## Flags that are settings\n", "| flag | setting |", "|---|---|"]
    for key, setting in settings().items():
        lines += [f"| `--{flag}` | `{key}` |" for flag in setting.flags]
    lines += [f"| `--{name}` | `{peer.becomes}` |" for name, peer in PEERS.items() if peer.becomes is not None]
    lines += ["\n## Flags without effect\n", "| flag | accepted values | why it has no effect |", "|---|---|---|"]
    for name, peer in PEERS.items():
        if peer.accepted is not None:
            values = "all" if peer.accepted == ANY else ", ".join(peer.accepted)
            lines.append(f"| `--{name}` | {values} | {peer.why} |")
    lines += ["\n## Flags that are refused\n", "| flag | reason |", "|---|---|"]
    for name, peer in PEERS.items():
        if peer.accepted is None and peer.becomes is None:
            lines.append(f"| `--{name}` | {peer.remedy.partition(';')[0]} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true", help="exit with 1 where the page is not up to date")
    if options.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
