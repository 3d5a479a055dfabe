"""Builds Transformer Engine from source, once, and installs it in a separate folder: `python scripts/build_te.py FOLDER`. Cached.

Only the test that constructs its layers needs it (tests/models/test_te_spec.py). Run it by the Python that has the CUDA build of torch.
Where torch's CUDA build or nvcc is missing, it prints this and does not create FOLDER. FOLDER is not on the path of that Python: Megatron
changes its defaults where it finds Transformer Engine, and the other tests are for Megatron without it.

The published source takes very long to compile: 33 files, and each includes all of torch. Here it is compiled without optimisation, as two
files that include the others, which takes minutes. Nothing is computed with this build.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

VERSION = "2.20.2"
FILES = 2
"""Number of files that are compiled in parallel."""
IMPORTED = ("onnx==1.23.2", "onnxscript==0.7.2", "onnx-ir==1.1.0", "ml-dtypes==0.6.0")
"""Its dependencies, direct and indirect, that the tests' environment does not have."""


def missing() -> str | None:
    """The reason why it cannot be built on this machine; None where it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return None if shutil.which("nvcc") else "nvcc is not on PATH"


def cache() -> Path:
    """The cache folder for wheels of this version, torch and Python."""
    import torch

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return home / "swift_mega" / f"transformer-engine-{VERSION}-torch-{torch.__version__}-{python}"


def build(wheels: Path) -> None:
    """Builds or downloads all wheels that are needed, into the new folder `wheels`."""
    from torch.version import cuda

    assert cuda is not None
    wheels.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheels.parent, prefix="building-") as work:
        made, source = Path(work) / "wheels", Path(work) / "source"
        core = f"transformer-engine-cu{cuda.partition('.')[0]}"
        published = [f"{name}=={VERSION}" for name in ("transformer-engine", core)]
        pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(made), *published, *IMPORTED)
        pip(
            "download",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary=:all:",
            "--dest",
            str(source),
            f"transformer-engine-torch=={VERSION}",
            environment=os.environ | compiler(),
        )
        pip(
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(made),
            str(unpacked(source)),
            environment=os.environ | compiler(),
        )
        made.rename(wheels)


def unpacked(source: Path) -> Path:
    """Unpacks the source distribution, and changes it so that it compiles fast; returns its folder."""
    (archive,) = source.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(source, filter="data")
    folder = source / archive.name.removesuffix(".tar.gz")
    options = folder / "build_tools" / "pytorch.py"
    text = options.read_text()
    assert '"-O3"' in text, f"{options} of Transformer Engine {VERSION} has no -O3"
    options.write_text(text.replace('"-O3"', '"-O0"'))

    groups: list[list[Path]] = [[] for _ in range(FILES)]
    for file in sorted((folder / "csrc").rglob("*.cpp"), key=lambda file: file.stat().st_size, reverse=True):
        smallest = min(groups, key=lambda group: sum(each.stat().st_size for each in group))
        smallest.append(file.rename(file.with_suffix(".inc")))
    for number, group in enumerate(groups):
        lines = [f'#include "{file.relative_to(folder / "csrc")}"\n' for file in sorted(group)]
        (folder / "csrc" / f"together{number}.cpp").write_text("".join(lines))
    return folder


def compiler() -> Mapping[str, str]:
    """Environment variables of the build: the CUDA toolkit of nvcc (nvcc may be a wrapper script), and the headers of torch's CUDA."""
    said = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    ).stderr
    (here,) = [line.partition("=")[2] for line in said.splitlines() if line.startswith("#$ _HERE_=")]
    toolkit = Path(here).parent
    headers = [toolkit / "include", *Path(sysconfig.get_path("purelib"), "nvidia").glob("*/include")]
    return {
        "CUDA_HOME": str(toolkit),
        "CPATH": os.pathsep.join(map(str, headers)),
        "MAX_JOBS": str(FILES),
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
        "NVTE_WITH_NCCL_EP": "0",
        "NVTE_FRAMEWORK": "pytorch",
    }


def pip(*arguments: str, environment: Mapping[str, str] | None = None) -> None:
    """Runs pip of this Python; CalledProcessError where it fails, after pip has printed its error."""
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--quiet", "--disable-pip-version-check", *arguments],
        check=True,
        env=environment,
    )


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    options.add_argument("folder", type=Path, help="directory to install into; existing files are replaced")
    folder = options.parse_args().folder
    if (reason := missing()) is not None:
        print(f"[te] Transformer Engine is not built here, and tests of its layers will be skipped: {reason}")
        return 0
    wheels, begin = cache(), time.monotonic()
    if not wheels.is_dir():
        print(f"[te] building Transformer Engine {VERSION} (minutes, once)", flush=True)
        build(wheels)
        print(f"[te] built in {time.monotonic() - begin:.0f} s and kept in {wheels}")
    shutil.rmtree(folder, ignore_errors=True)
    pip("install", "--no-deps", "--no-index", "--target", str(folder), *map(str, sorted(wheels.glob("*.whl"))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
