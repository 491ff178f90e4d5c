#!/usr/bin/env python3
"""Build what a release consists of, check it, and tag the commit.

    python scripts/release.py            build into dist/ and check
    python scripts/release.py --tag      and tag the commit, if nothing is wrong

The version is ``__version__`` of the package. docs/releasing.md has the steps around it. Needs
hatchling, of the dev extra.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vllm_specplus"
#: Of a wheel: code, and nothing that has to be fetched or trained.
MOST_BYTES = 2 << 20
ENTRY_POINTS = (
    "vllm-specplus = vllm_specplus.cli.main:app",
    "specplus = vllm_specplus.plugin:register",
    "specplus_images = vllm_specplus.engine.images_api:ImagesEndpoint",
)
SOURCES = ("pyproject.toml", "hatch_build.py", "vllm_specplus/kernels/cpu/kernels.cpp")


def git(root: Path, *arguments: str) -> str:
    return subprocess.check_output(["git", "-C", str(root), *arguments], text=True).strip()


def version_of(root: Path) -> str:
    """``__version__`` of the checkout, which is the only place that says it."""
    text = (root / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.M).group(1)


def tag_problems(root: Path) -> Iterator[str]:
    """Tags of a version that are on this commit and say another one than the package."""
    expected = f"v{version_of(root)}"
    for tag in git(root, "tag", "--points-at", "HEAD", "--list", "v[0-9]*").split():
        if tag != expected:
            yield f"the commit is tagged {tag}, and the package says {expected}"


def checkout_problems(root: Path) -> Iterator[str]:
    """What keeps this commit from being released."""
    version = version_of(root)
    if git(root, "status", "--porcelain"):
        yield "the checkout is not clean: commit or remove what `git status` lists"
    yield from tag_problems(root)
    tag = ("tag", "--list", f"v{version}")
    if git(root, *tag) != git(root, *tag, "--points-at", "HEAD"):
        yield f"v{version} is the tag of another commit: raise __version__"
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = rf"^## \[?{re.escape(version)}\]? - \d{{4}}-\d\d-\d\d$"
    entry = re.search(rf"{heading}(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    if not entry or not entry.group(1).strip():
        yield f"CHANGELOG.md has no entry: write '## {version} - YYYY-MM-DD' and what changed"


def build(root: Path, folder: Path) -> tuple[Path, Path]:
    """Build the wheel, without compiled kernels, and the sdist into the empty ``folder``."""
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    environment = os.environ | {"SPECPLUS_BUILD_KERNELS": "0"}
    subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def wheel_problems(wheel: Path, version: str) -> Iterator[str]:
    """What is wrong with a wheel."""
    size = wheel.stat().st_size
    if size >= MOST_BYTES:
        yield f"{wheel.name} has {size} bytes, and {MOST_BYTES} are the limit"
    info = f"{PACKAGE}-{version}.dist-info"
    archive = zipfile.ZipFile(wheel)
    if f"{info}/METADATA" not in archive.namelist():
        yield f"{wheel.name} is not of version {version}"
        return
    lines = archive.read(f"{info}/entry_points.txt").decode().splitlines()
    for missing in [each for each in ENTRY_POINTS if each not in lines]:
        yield f"{wheel.name} lacks the entry point {missing}"


def sdist_problems(sdist: Path, version: str) -> Iterator[str]:
    """What an sdist lacks to build a wheel from."""
    with tarfile.open(sdist) as archive:
        packed = set(archive.getnames())
    for name in SOURCES:
        if f"{PACKAGE}-{version}/{name}" not in packed:
            yield f"{sdist.name} lacks {name}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tag", action="store_true", help="tag the commit if nothing is wrong")
    tag = parser.parse_args(arguments).tag
    version, dist = version_of(ROOT), ROOT / "dist"
    if dist.exists() and any(dist.iterdir()):
        sys.exit(f"{dist} is not empty: remove what an earlier build left")
    problems = list(checkout_problems(ROOT))
    wheel, sdist = build(ROOT, dist)
    problems += [*wheel_problems(wheel, version), *sdist_problems(sdist, version)]
    if problems:
        sys.exit("\n".join(problems))
    if tag and not git(ROOT, "tag", "--list", f"v{version}"):
        git(ROOT, "tag", "--annotate", "--message", f"vllm-specplus {version}", f"v{version}")
    print(f"{wheel.name} and {sdist.name} are in {dist}" + f"; tagged v{version}" * tag)


if __name__ == "__main__":
    main(sys.argv[1:])
