"""``scripts/setup.py``: what it installs, and when it has nothing to do."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def setup(tmp_path, monkeypatch):
    path = Path(__file__).parents[1] / "scripts" / "setup.py"
    spec = importlib.util.spec_from_file_location("setup_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path)
    monkeypatch.setattr(module, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(module, "LOG", tmp_path / "log")
    return module


def test_tests_need_more_than_the_demo(setup):
    assert not setup.is_ready("cpu", "demo")
    setup.STAMP.write_text(setup.key("cpu", "demo"))
    assert setup.is_ready("cpu", "demo")
    assert not setup.is_ready("cpu", "full")
    setup.STAMP.write_text(setup.key("cpu", "full"))
    assert setup.is_ready("cpu", "demo")
    assert setup.is_ready("cpu", "full")
    assert not setup.is_ready("cuda", "full")


def test_packages_come_from_where_pip_is_told_to_look(setup, monkeypatch):
    told = (
        ":env:.find-links='/wheels'\n"
        "global.extra-index-url='file:///a/simple file:///b/simple'\n"
        "global.index-url='file:///c/simple'\n"
        "user.index-url='file:///d/simple'\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=told))
    assert setup.sources() == [
        "--find-links", "/wheels", "--index-url", "file:///d/simple",
        "--extra-index-url", "file:///a/simple", "--extra-index-url", "file:///b/simple",
        "--index-strategy", "unsafe-best-match",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "level", "left_out"),
    [
        ("cpu", "demo", ["torchvision", "torchaudio", "torchcodec", "triton"]),
        ("cpu", "full", ["torchvision", "torchaudio", "torchcodec"]),
        ("cuda", "full", []),
    ],
)
def test_what_does_not_run_here_is_not_installed(setup, monkeypatch, backend, level, left_out):
    ran = []
    monkeypatch.setattr(setup, "run", lambda *command: ran.append([str(word) for word in command]))
    monkeypatch.setattr(setup, "sources", list)
    setup.install(backend, level)
    assert ran[-1][-1] == f".[{backend},{setup.LEVELS[level]}]"
    if not left_out:
        assert "--override" not in ran[-1]
        return
    overrides = Path(ran[-1][ran[-1].index("--override") + 1]).read_text().splitlines()
    assert [line.split()[0] for line in overrides] == left_out
    assert all("python_version < '3'" in line for line in overrides)


def test_a_cpu_build_of_torch_is_looked_for_where_torch_is(setup, monkeypatch):
    ran = []

    def run(*command):
        ran.append([str(word) for word in command])
        if "install" in command and "uv" in str(command[0]) and "--torch-backend" not in command:
            raise setup.CommandError("there is no version of torch==2.13.0+cpu")

    monkeypatch.setattr(setup, "run", run)
    monkeypatch.setattr(setup, "sources", list)
    setup.install("cpu", "demo")
    assert ran[-1][-4:-2] == ["--torch-backend", "cpu"]
    with pytest.raises(setup.CommandError):
        setup.install("cuda", "full")
