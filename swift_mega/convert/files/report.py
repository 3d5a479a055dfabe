"""`report.json` beside the weights: the sha256 of every tensor, by which a later reader can detect changed bytes.

The checksums are computed from the files after writing, so they describe what is on disk.
"""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import swift_mega
from swift_mega.convert.files.hf_files import NAMES, Checkpoint, read_json
from swift_mega.convert.files.hf_write import Planned, digest, hashing_threads
from swift_mega.errors import UserError

REPORT = "report.json"


def checksums(
    directory: Path, planned: Mapping[str, Planned], names: Iterable[str], *, sharers: int = 1
) -> dict[str, str]:
    """sha256 of the bytes in the files of each of these tensors. sharers: how many processes on this machine hash at the same time."""

    def one(name: str) -> tuple[str, str]:
        place = planned[name]
        return name, digest(directory / place.file, place.offset, place.bytes)

    with ThreadPoolExecutor(hashing_threads(sharers)) as pool:
        return dict(pool.map(one, names))


def write_report(directory: Path, planned: Mapping[str, Planned], found: Mapping[str, str], **more: Any) -> None:
    """Writes report.json; `more` are further fields, such as where the weights came from."""
    tensors = {
        name: {"file": place.file, "dtype": NAMES[place.dtype], "shape": list(place.shape), "sha256": found[name]}
        for name, place in planned.items()
    }
    report = {
        "written_by": f"swift_mega {swift_mega.__version__}",
        **more,
        "tensors_in_all": len(tensors),
        "bytes_in_all": sum(place.bytes for place in planned.values()),
        "tensors": tensors,
    }
    (directory / REPORT).write_text(json.dumps(report, indent=1) + "\n")


def problems(directory: str | Path) -> tuple[int, list[str]]:
    """(number of tensors in report.json, differences between it and the files); UserError where there is no valid report.json."""
    path = Path(directory) / REPORT
    if not path.is_file():
        raise UserError(
            f"{directory} has no {REPORT}, so its bytes cannot be checked; swift-mega writes one beside weights"
        )
    said = read_json(path).get("tensors")
    if not isinstance(said, dict) or not all(isinstance(one, dict) and "sha256" in one for one in said.values()):
        raise UserError(f"{path} is not a report of tensors; write the directory again")
    checkpoint, found = Checkpoint(directory), []
    for name in sorted(said.keys() - checkpoint.entries.keys()):
        found.append(f"{name} is missing")
    for name in sorted(checkpoint.entries.keys() - said.keys()):
        found.append(f"{name} in {checkpoint.entries[name].file.name} is not in {REPORT}")
    planned = {
        name: Planned(entry.dtype, entry.shape, entry.file.name, entry.begin)
        for name, entry in checkpoint.entries.items()
    }
    both = [name for name in said if name in planned]
    now = checksums(Path(directory), planned, both)
    for name in both:
        place, was = planned[name], said[name]
        if NAMES[place.dtype] != was.get("dtype") or list(place.shape) != was.get("shape"):
            found.append(
                f"{name} is {NAMES[place.dtype]} {list(place.shape)}, was {was.get('dtype')} {was.get('shape')}"
            )
        elif now[name] != was["sha256"]:
            found.append(
                f"{name} in {place.file} has other bytes (sha256 {now[name][:12]}…, was {was['sha256'][:12]}…)"
            )
    return len(said), found
