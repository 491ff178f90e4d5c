"""How the C++ kernels of ``kernels/cpu`` are compiled: for this machine, or into a wheel.

The build of a wheel runs this file, so it needs the standard library only.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "cpu"
SOURCE = FOLDER / "kernels.cpp"
# Not -ffast-math: linking with it would flush denormals in the whole process.
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-ffinite-math-only",
]
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")


@dataclass(frozen=True)
class Variant:
    """A library that a wheel brings, and the processors that run it.

    ``needs``: names of /proc/cpuinfo; all that the compiler may use for ``flags``.
    """

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]

    @property
    def path(self) -> Path:
        """Where an installation has it, if it has it."""
        return FOLDER / f"kernels-{self.name}.so"


_V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AMX = _V4 | {"amx_tile", "amx_bf16"}
#: By machine; a processor takes the first that it runs.
VARIANTS = {
    "x86_64": (
        Variant("amx", ("-march=x86-64-v4", "-mamx-tile", "-mamx-bf16"), frozenset(_AMX)),
        Variant("x86-64-v4", ("-march=x86-64-v4",), frozenset(_V4)),
        Variant("x86-64-v3", ("-march=x86-64-v3",), frozenset(_V3)),
    ),
    "aarch64": (
        Variant("armv8.2-a", ("-march=armv8.2-a+fp16",), frozenset(("asimd", "fphp", "asimdhp"))),
    ),
}


def variants() -> tuple[Variant, ...]:
    """Return what a wheel for this kind of machine brings."""
    return VARIANTS.get(platform.machine(), ())


def features() -> str:
    """Return the line of what this processor can do; -march=native depends on it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    lines = text.splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def find() -> str:
    """Return the C++ compiler; raises RuntimeError with one sentence if there is none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise RuntimeError("no C++ compiler found (install g++ or set CXX)")
    return compiler


def run(compiler: str, target: str | Path, *flags: str) -> None:
    """Compile the kernels into ``target``; raises RuntimeError with one sentence."""
    command = [compiler, *FLAGS, *flags, "-o", str(target), str(SOURCE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{compiler} cannot be run: {error}") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-400:]}")
