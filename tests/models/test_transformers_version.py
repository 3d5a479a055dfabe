"""An older transformers is refused when a model is opened; the range is that of setup.py."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from swift_mega.errors import UserError
from swift_mega.models.family import family_of
from swift_mega.models.transformers_version import BELOW, LOWEST, check_transformers

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """The answer is cached for the life of a process."""
    check_transformers.cache_clear()
    yield
    check_transformers.cache_clear()


def test_the_range_is_that_of_setup() -> None:
    lowest, below = (".".join(map(str, each)) for each in (LOWEST, BELOW))
    assert f'"transformers>={lowest},<{below}"' in SETUP.read_text()


@pytest.mark.parametrize("version", ["5.23.0", "5.23.1.dev0", "5.40.2"])
def test_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    check_transformers()


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("5.17.0", r"^transformers 5\.17\.0 is installed, and models are read with 5\.23 or newer: .*MiniMax-M2.*; pip install "),
        ("4.57.3", r"^transformers 4\.57\.3 is installed"),
        ("6.0.0", r"^transformers 6\.0\.0 is installed, and models are read with 5\.23 up to, not including, 6: .*; pip install "),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, said: str) -> None:
    """By `family_of`, which every known model passes."""
    (tmp_path / "config.json").write_text('{"model_type": "minimax_m2"}')
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(UserError, match=said):
        family_of(tmp_path)
