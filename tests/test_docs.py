"""Generated pages are up to date, and links between pages have a target."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("check", "mend"),
    [
        (["scripts/models_page.py", "--check"], "scripts/models_page.py"),
        (["scripts/token_layout.py", "--check"], "scripts/token_layout.py"),
        (["scripts/swift_page.py", "--check"], "scripts/swift_page.py"),
        (["benchmarks/gpu_session.py", "--check-docs"], "benchmarks/gpu_session.py --docs"),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_what_code_draws_is_current(check: list[str], mend: str) -> None:
    made = subprocess.run([sys.executable, *check], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, f"run `python {mend}`\n{made.stderr}"


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_secret_places() -> None:
    """No page of the repository names paths of one machine."""
    for page in [
        ROOT / "README.md",
        ROOT / "Makefile",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "scripts").glob("*.py"),
    ]:
        assert not re.search(r"(?<![\w.])/(root|work|home)/", page.read_text()), page.name
