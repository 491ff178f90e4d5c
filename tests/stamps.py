"""Tests that last too long for every run: which files each of them covers, and when it last passed.

``@pytest.mark.full("vllm_specplus/drafting/**", ...)`` names what a test covers besides its own
file: patterns of paths from the root. ``make full`` runs these tests and writes ``full.json``: of
each, a digest of all those files. Any other run leaves the tests out, and ``test_full.py`` fails
where a file has changed since its tests passed.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from pathlib import Path

import pytest

from vllm_specplus.compat import vllm_version

ROOT = Path(__file__).parents[1]
STAMPS = Path(__file__).parent / "full.json"

LONG = pytest.StashKey[dict[str, str]]()
"""In a session's stash: the digest of every long test, run or not."""
FILES = pytest.StashKey[set[str]]()
"""The files of all tests."""


def digest(patterns: Iterable[str], root: Path = ROOT) -> str:
    """Of the files that any of ``patterns`` names, by path and content.

    ValueError with one sentence if a pattern names none: it is misspelt, or its files have moved.
    """
    files: set[Path] = set()
    for pattern in patterns:
        found = {path for path in root.glob(pattern) if path.is_file()}
        found = {path for path in found if "__pycache__" not in path.parts}
        if not found:
            raise ValueError(f"pytest.mark.full: {pattern!r} names no file")
        files |= found
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(f"{path.relative_to(root)}\0".encode())
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]


def covered(item: pytest.Item) -> str | None:
    """Digest of what a long test covers, its own file included; None: it is not long."""
    mark = item.get_closest_marker("full")
    if mark is None:
        return None
    return digest([*mark.args, str(item.path.relative_to(ROOT))])


def stale(tests: dict[str, str], looked_at: Iterable[str], stamps: Path = STAMPS) -> list[str]:
    """A sentence for each of ``tests`` (name -> digest) that has not passed as its files are, and
    for each stamp of a test that is no more in the file it was in, of those ``looked_at``."""
    passed = json.loads(stamps.read_text(encoding="utf-8"))["tests"] if stamps.exists() else {}
    return [
        f"{name}: {'its files have changed since it passed' if name in passed else 'never passed'}"
        for name, files in tests.items()
        if passed.get(name, {}).get("digest") != files
    ] + [
        f"{name}: stamped, and no more there"
        for name in passed
        if name not in tests and name.split("::")[0] in looked_at
    ]


class Stamping:
    """A pytest plugin of the process that hears of all results: stamps the long tests that pass,
    and keeps the stamps of those that did not run."""

    def __init__(self, stamps: Path = STAMPS):
        self._stamps = stamps
        self._results: dict[str, dict | None] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        files = dict(report.user_properties).get("covers")
        if files is None:
            return
        if report.failed:
            self._results[report.nodeid] = None
        elif report.when == "call" and report.passed and report.nodeid not in self._results:
            seconds = round(report.duration, 1)
            self._results[report.nodeid] = {"digest": files, "seconds": seconds}

    def pytest_sessionfinish(self) -> None:
        if not self._results:
            return
        before = {}
        if self._stamps.exists():
            before = json.loads(self._stamps.read_text(encoding="utf-8"))["tests"]
        tests = {name: stamp for name, stamp in (before | self._results).items() if stamp}
        content = {
            "command": "make full",
            "vllm": vllm_version(),
            "machine": platform.machine(),
            "tests": dict(sorted(tests.items())),
        }
        self._stamps.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
