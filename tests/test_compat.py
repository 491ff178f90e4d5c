from __future__ import annotations

import pytest

from vllm_specplus import compat


def test_every_hook_is_there():
    assert [hook for hook in compat.check() if hook.problem] == []


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (compat.Hook("vllm.nowhere:f", "x"), "missing"),
        (compat.Hook("vllm.engine.arg_utils:EngineArgs.nothing", "x"), "missing"),
        (compat.Hook("vllm.v1.sample.sampler:Sampler.forward", "x", ("gone",)), "gone is gone"),
    ],
)
def test_a_broken_hook_is_reported(monkeypatch, hook, words):
    monkeypatch.setattr(compat, "HOOKS", (hook,))
    (checked,) = compat.check()
    assert words in checked.problem


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.32.0", True),
        ("0.33.1+cpu", True),
        ("0.33.0rc1", True),
        ("0.31.0", False),
        ("0.34.0", False),
    ],
)
def test_versions(monkeypatch, version, supported):
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    assert (compat.unsupported_version() is None) == supported


def test_outside_its_range_the_plugin_does_nothing(monkeypatch, caplog):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_specplus import plugin

    before = EngineArgs.create_speculative_config
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.31.0")
    plugin.register()
    assert EngineArgs.create_speculative_config is before
    assert "vllm-specplus is inactive: vLLM 0.31.0 is outside" in caplog.text


def test_a_healthy_hook_has_no_problem_and_keeps_its_fields(monkeypatch):
    hook = compat.Hook("vllm.v1.sample.sampler:Sampler.forward", "x", ("sampling_metadata",))
    monkeypatch.setattr(compat, "HOOKS", (hook,))
    assert compat.check() == [hook]


def test_the_installed_vllm_is_supported():
    assert compat.unsupported_version() is None


def test_no_vllm_at_all(monkeypatch):
    monkeypatch.setattr(compat, "vllm_version", lambda: None)
    assert compat.unsupported_version() == "vLLM is not installed"


def test_the_reason_names_version_and_range(monkeypatch):
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.31.0")
    assert "0.31.0" in compat.unsupported_version()
    assert compat.SUPPORTED in compat.unsupported_version()
