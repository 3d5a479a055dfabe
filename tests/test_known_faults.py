"""The list of known faults fits the code, and the program that judges them distinguishes found from missed (`make test-the-tests` runs
all)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "faults"))
from run import ROOT, Edit, Fault, apply, read

FAULTS = read()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_edit_fits(fault: Fault, tmp_path: Path) -> None:
    """Each old text is in its file exactly once, and the result is still valid Python."""
    for name in {edit.file for edit in fault.edits}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    apply(fault, tmp_path)
    for edit in fault.edits:
        compile((tmp_path / edit.file).read_text(), edit.file, "exec")


@pytest.mark.parametrize(("text", "count"), [("a = 2\n", 0), ("a = 1\na = 1\n", 2)])
def test_an_edit_that_no_longer_fits_is_an_error(tmp_path: Path, text: str, count: int) -> None:
    (tmp_path / "file.py").write_text(text)
    with pytest.raises(
        ValueError, match=rf"file.py holds {count} times, not once: 'a = 1'; bring tests/faults/faults.toml up"
    ):
        apply(Fault(name="one", tests="", edits=(Edit(file="file.py", old="a = 1", new="a = 3"),)), tmp_path)
