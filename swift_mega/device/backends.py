"""Optional packages that compute, and whether they can be used. Only this module checks that.

CUDA needs nothing but torch and Megatron-core. Transformer Engine, flash-attn and apex are used where they are installed. Without them,
Megatron's local modules and torch's kernels do the same work.
"""

import functools
import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

TE_DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes of the models that use Transformer Engine's modules here.

Transformer Engine has no float64. It multiplies float32 in TF32 (cublaslt_gemm.cu: CUBLAS_COMPUTE_32F_FAST_TF32), which keeps 10 bits of
the mantissa in place of 23. A float32 proof would then compare rounding errors, so float32 uses Megatron's local modules.
"""
BROKEN = (ImportError, OSError, RuntimeError, AttributeError)
"""What an import raises where a package does not fit torch, CUDA or a library that is loaded."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """An optional package: its version if it can be used, else the reason why it cannot."""

    name: str
    version: str | None = None
    problem: str = "is not installed"

    def __str__(self) -> str:
        return f"{self.name} {self.version}" if self.version else f"{self.name} {self.problem}"


@functools.cache
def transformer_engine() -> Package:
    """Transformer Engine, imported. If the import fails, it is hidden from all later imports of this process.

    Megatron catches only ImportError. It also takes a package whose torch part is missing for a complete one, and then fails in its own
    import.
    """
    name = "Transformer Engine"
    if importlib.util.find_spec("transformer_engine") is None:
        return Package(name=name)
    try:
        importlib.import_module("transformer_engine.pytorch")
    except BROKEN as error:
        for module in [key for key in sys.modules if key.split(".")[0] == "transformer_engine"]:
            del sys.modules[module]
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
        said = " ".join(str(error).split()) or type(error).__name__
        return Package(name=name, problem=f"is installed and cannot be imported ({said})")
    return Package(name=name, version=metadata.version("transformer-engine"))


def flash_attn() -> Package:
    """flash-attn 2; ops/attention.py imports it."""
    if not _there("flash_attn"):
        return Package(name="flash-attn")
    return Package(name="flash-attn", version=metadata.version("flash-attn"))


def apex() -> Package:
    """NVIDIA's apex with its CUDA kernels. PyPI's package of that name is another project and has no amp_C."""
    return Package(name="apex", version="with kernels") if _there("amp_C") else Package(name="apex")


def wgrad_kernel() -> bool:
    """Whether apex's kernel is installed that computes a weight's gradient and adds it to the sum of gradients in one product."""
    return _there("fused_weight_gradient_mlp_cuda")


def cannot_compile() -> str | None:
    """What torch.compile lacks on this machine for a kernel on CUDA; None: nothing."""
    if not _there("triton"):
        return "the package triton, which is not installed; install it"
    if _c_compiler() is None:
        return "a C compiler, and there is none on PATH; install gcc or clang, name one in CC"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python.h, which is missing; install Python's headers (python3-dev)"
    return None


def _c_compiler() -> str | None:
    """The C compiler that Triton would use: the one that CC names, else clang or gcc on PATH; None: there is none."""
    return os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
