"""Puts compiled CPU kernels into a wheel when ``SPECPLUS_BUILD_KERNELS=1`` asks for it.

Such a wheel is for one kind of machine, and for containers without a compiler. By default a wheel
is pure Python, and the kernels are compiled on first use.
"""

from __future__ import annotations

import os
import runpy
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "SPECPLUS_BUILD_KERNELS"


class KernelsHook(BuildHookInterface):
    """Compiles one library per variant of the processor."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the libraries and the platform's tag; an editable installation compiles by itself."""
        if version != "standard" or os.environ.get(VARIABLE, "0") in ("", "0"):
            return
        # By path: nothing of the package is installed where a wheel is built.
        compiler = runpy.run_path(str(Path(self.root, "vllm_specplus/kernels/compiler.py")))
        variants = compiler["variants"]()
        if not variants:
            raise RuntimeError(f"{VARIABLE}: there are no compiled kernels for this machine")
        self._folder = tempfile.TemporaryDirectory()
        for variant in variants:
            library = Path(self._folder.name, variant.path.name)
            compiler["run"](compiler["find"](), library, *variant.flags)
            inside = variant.path.relative_to(self.root).as_posix()
            build_data["force_include"][str(library)] = inside
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()
