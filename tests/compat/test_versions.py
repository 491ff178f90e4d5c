"""Which vLLM is supported, and what the plugin does in one that is not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_specplus import compat
from vllm_specplus.compat.report import Problem, Report


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


@pytest.fixture
def outside(monkeypatch):
    """The plugin, registered in a vLLM outside of its range: the method it left in EngineArgs."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_specplus import plugin

    # As if no plugin had been here before; monkeypatch puts back what was.
    method = EngineArgs.create_speculative_config
    stock = getattr(method, "__wrapped__", method)
    monkeypatch.setattr(EngineArgs, "create_speculative_config", stock)
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.34.0")
    monkeypatch.setattr(plugin, "_register_models", lambda: pytest.fail("registers models"))
    plugin.register()
    return EngineArgs.create_speculative_config


def test_outside_its_range_a_method_of_ours_is_refused_in_one_sentence(outside):
    arguments = SimpleNamespace(speculative_config={"method": "token_recycling"})
    with pytest.raises(ValueError, match=r"token_recycling.*one of vllm-specplus") as refused:
        outside(arguments, None, None)
    assert "vLLM 0.34.0 is outside the supported range >=0.32,<0.34" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_outside_its_range_everything_else_is_vllms(outside):
    for config in (None, {"method": "ngram"}):
        with pytest.raises(AttributeError, match="spec_method"):  # read by vLLM's own first
            outside(SimpleNamespace(speculative_config=config), None, None)


def test_where_even_the_entry_is_gone_a_warning_is_logged(monkeypatch, caplog):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_specplus import plugin

    monkeypatch.delattr(EngineArgs, "create_speculative_config")
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.34.0")
    plugin.register()
    assert "vllm-specplus is inactive: vLLM 0.34.0 is outside" in caplog.text


@pytest.mark.parametrize("version", [*compat.CHECKED, "0.32.0+cpu"])
def test_a_version_that_ci_checks_is_not_read_again(monkeypatch, version):
    monkeypatch.setattr(compat, "check", lambda: pytest.fail("reads vLLM's source"))
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    assert compat.first_problem() is None


@pytest.mark.parametrize("version", ["0.32.1", "0.33.0rc1"])
def test_any_other_version_is_read_before_it_is_used(monkeypatch, version):
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    problem = Problem("vllm_specplus/engine/runner.py:1", "vllm.v1.f", "does not exist")
    monkeypatch.setattr(compat, "check", lambda: Report(problems=[problem]))
    assert compat.first_problem() == problem
    monkeypatch.setattr(compat, "check", Report)
    assert compat.first_problem() is None


def test_ci_checks_every_version_it_is_said_to():
    root = Path(__file__).parents[2]
    assert "make check-vllm" in (root / ".ci" / "run").read_text()
    for version in compat.CHECKED:
        assert f"--wheel {version}" in (root / "Makefile").read_text()


def test_the_installed_vllm_is_supported():
    assert compat.unsupported_version() is None


def test_no_vllm_at_all(monkeypatch):
    monkeypatch.setattr(compat, "vllm_version", lambda: None)
    assert compat.unsupported_version() == "vLLM is not installed"


def test_the_reason_names_version_and_range(monkeypatch):
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.31.0")
    assert "0.31.0" in compat.unsupported_version()
    assert compat.SUPPORTED in compat.unsupported_version()
