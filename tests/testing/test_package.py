"""A method in a package of its own, and the guide that is built around it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests" / "packages" / "successors"
GUIDE = ROOT / "docs" / "adding_a_method.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """The environment of a process that has the package."""
    folder = tmp_path_factory.mktemp("packages")
    source = shutil.copytree(PACKAGE, folder / "source")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
            "--no-index", "--target", str(folder / "site"), str(source),
        ],
        check=True,
    )  # fmt: skip
    path = os.pathsep.join((str(folder / "site"), str(ROOT)))
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return inherited | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def python(installed: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], env=installed, cwd=PACKAGE, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_doctor_lists_the_method_with_its_package(installed):
    code = "from vllm_specplus.cli.main import app; app()"
    report = json.loads(python(installed, "-c", code, "doctor", "--json").stdout)
    found = {f["name"]: f for f in report["findings"] if f["section"] == "Methods"}
    assert found["successors"]["value"] == "specplus-successors 0.1"
    assert found["successors"]["status"] == "ok"
    assert found["token_recycling"]["value"] == "vllm-specplus"


@pytest.mark.engine
def test_the_authors_own_tests_pass(installed):
    """It drafts in ``LLM(...)``, found by its entry point alone, and is lossless."""
    done = python(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "check_successors.py")
    assert done.returncode == 0, done.stdout[-6000:]
    assert "2 passed" in done.stdout


@pytest.mark.parametrize(
    "file", ["pyproject.toml", "specplus_successors.py", "check_successors.py"]
)
def test_the_guide_shows_the_files_that_are_tested(file):
    shown = re.search(rf"`{re.escape(file)}`:\n\n```\w+\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == (PACKAGE / file).read_text()
