"""``vllm-specplus bench --task image``, from the command line to its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_specplus.cli.model import IMAGE_MODEL

pytestmark = pytest.mark.engine


def test_methods_side_by_side(tmp_path):
    methods = 'none,jacobi:control={"policy":"fixed"}:num_speculative_tokens=7,jacobi:nonsense=1'
    command = [
        str(Path(sys.executable).parent / "vllm-specplus"), "bench", "--task", "image",
        "--model", str(IMAGE_MODEL), "--methods", methods, "--limit", "60", "--concurrency", "20",
        "--engine-arg", "enforce_eager=true", "--json", f"{tmp_path}/out.json",
        "--plot", f"{tmp_path}/plot.png", "--sheet", f"{tmp_path}/sheet.png",
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=env | {"COLUMNS": "200"}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-3000:]  # one method failed, the others are there
    assert "jacobi:nonsense=1 failed:" in done.stdout
    assert "unknown key 'nonsense'" in done.stdout
    assert done.stderr.count(": measuring") == 2
    report = json.loads((tmp_path / "out.json").read_text())
    plain, jacobi = report["runs"]
    assert plain["steps_per_picture"] == 63  # the first code comes with the prompt
    assert 63 / 8 < jacobi["steps_per_picture"] < 60
    assert jacobi["nodes_per_step"] > 4
    assert not jacobi["lossy"]
    for run in (plain, jacobi):
        assert run["pictures"] == 60
        assert run["accuracy"] > 0.7
        assert run["distance_error"] > 0
    assert plain["distance_to_plain"] is None
    assert jacobi["distance_to_plain"] > 0
    for name in ("plot.png", "sheet.png"):
        assert (tmp_path / name).stat().st_size > 5000
