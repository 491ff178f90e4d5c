"""Which libraries vLLM's CPU worker wants preloaded, and where they are."""

from __future__ import annotations

import ctypes.util
import inspect
import platform
import sys
import sysconfig

import pytest

from vllm_specplus import preloads


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
