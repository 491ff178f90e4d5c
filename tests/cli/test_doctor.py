"""`vllm-specplus doctor`: every way the plugin can fail is named, with what to do about it."""

import importlib.metadata
import json
import logging
from dataclasses import replace

import pytest
import vllm.engine.arg_utils  # noqa: F401  before a test pretends to be on another platform
from typer.testing import CliRunner
from vllm.utils.cpu_resource_utils import MemoryNodeInfo

import vllm_specplus.engine.attention.cpu  # noqa: F401  the same
from tests.model_configs import LLAMA_3_8B
from vllm_specplus import compat, preloads
from vllm_specplus.capabilities import Found, Need
from vllm_specplus.cli import doctor
from vllm_specplus.cli.main import app
from vllm_specplus.compat.report import Problem, Report
from vllm_specplus.control import memory
from vllm_specplus.control.memory import ModelDimensions, speculation_bytes
from vllm_specplus.kernels import native
from vllm_specplus.proposers.token_recycling import TokenRecyclingConfig

PATCH = ("vllm.somewhere.Args.create", "vllm_specplus/plugin.py:1")
SOUND = Report(counts={"imports": 7, "overrides": 5}, patches=[PATCH])
MEMORY_NODE = "vllm.utils.cpu_resource_utils.get_memory_node_info"
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
    monkeypatch.setattr(compat, "check", lambda: SOUND)
    monkeypatch.setattr(native, "status", lambda: None)
    monkeypatch.setattr(native, "origin", lambda: "compiled")
    monkeypatch.setattr(MEMORY_NODE, lambda: MemoryNodeInfo(8 << 30, 4 << 30))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setattr(preloads, "wanted", list)
    for variable in ("VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER", preloads.VARIABLE):
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
    assert "Everything works." in result.output
    for text in ("vllm-cpu 0.32.0", "2.13.0+cpu", "7 imports", PATCH[0], "compiled"):
        assert text in result.output


def test_json_is_alone_on_stdout(monkeypatch):
    def chatty():
        print("a library that talks")
        return SOUND

    monkeypatch.setattr(compat, "check", chatty)
    report = json.loads(run("--json").stdout)
    assert report["works"] is True
    names = [finding["name"] for finding in report["findings"]]
    assert names[:2] == ["vllm-specplus", "Python"]
    assert PATCH[0] in names


def test_broken_hook(monkeypatch):
    gone = Problem("vllm_specplus/engine/runner.py:1", "vllm.somewhere.Runner._sample", "[gone]")
    monkeypatch.setattr(compat, "check", lambda: replace(SOUND, problems=[gone]))
    finding = only_trouble()
    assert (finding.status, finding.name) == ("error", gone.target)
    assert finding.value == "[gone] (vllm_specplus/engine/runner.py:1)"
    assert compat.SUPPORTED in finding.remedy

    result = run()
    assert result.exit_code == 1
    assert "[gone]" in result.output  # brackets are not markup
    assert "What to do" in result.output
    assert "will not work" in result.output
    result = run("--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["works"] is False


def test_no_vllm(monkeypatch):
    monkeypatch.setattr(compat, "vllm_version", lambda: None)
    monkeypatch.setattr(compat, "check", lambda: pytest.fail("there is nothing to compare with"))
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


def device_finding(name):
    (finding,) = [each for each in doctor.device() if each.name == name]
    return finding


def test_the_wheels_kernels_are_told_from_compiled_ones(monkeypatch):
    assert device_finding("C++ kernels").value == "compiled"
    monkeypatch.setattr(native, "origin", lambda: "the wheel's, kernels-x86-64-v3.so")
    assert device_finding("C++ kernels").value == "the wheel's, kernels-x86-64-v3.so"


def test_memory_that_vllm_takes_on_a_cpu(monkeypatch):
    name = "VLLM_CPU_KVCACHE_SPACE"
    assert device_finding(name).value == "1 GiB for the KV cache"
    monkeypatch.delenv(name)
    # 0.92 of 8 GiB are not there.
    finding = only_trouble()
    assert (finding.status, finding.name) == ("warning", name)
    assert "0.92 of the memory, 7.4 GiB of 8.0 GiB; 4.0 GiB are available" in finding.value
    assert f"{name}=4" in finding.remedy
    assert "Everything works, but for what the warnings say." in run().output
    monkeypatch.setattr(MEMORY_NODE, lambda: MemoryNodeInfo(8 << 30, 8 << 30))
    finding = device_finding(name)
    assert finding.status == "ok"
    assert "does not start" not in finding.value
    assert f"{name}=4" in finding.remedy


TCMALLOC = preloads.Library("libtcmalloc", "libtcmalloc_minimal.so.4", "apt install tcmalloc")
OPENMP = preloads.Library("libiomp", "/venv/lib/libiomp5.so", "pip install openmp")


def test_libraries_to_preload(monkeypatch):
    monkeypatch.setattr(preloads, "wanted", lambda: [TCMALLOC, OPENMP])
    finding = device_finding("LD_PRELOAD")
    assert finding.status == "ok"
    assert "libtcmalloc is not preloaded, libiomp is not preloaded" in finding.value
    assert "changed nothing that could be measured" in finding.value
    line = "LD_PRELOAD=libtcmalloc_minimal.so.4:/venv/lib/libiomp5.so"
    assert finding.remedy == f"export {line}"
    monkeypatch.setenv(*line.split("="))
    finding = device_finding("LD_PRELOAD")
    assert finding.value == "libtcmalloc is preloaded, libiomp is preloaded"
    assert finding.remedy is None


def test_libraries_to_install_before_they_are_preloaded(monkeypatch):
    monkeypatch.setattr(preloads, "wanted", lambda: [replace(TCMALLOC, path=None), OPENMP])
    monkeypatch.setenv("LD_PRELOAD", "/other.so")
    finding = device_finding("LD_PRELOAD")
    assert finding.value.startswith("libtcmalloc is not installed, libiomp is not preloaded")
    line = "export LD_PRELOAD=/venv/lib/libiomp5.so:/other.so"
    assert finding.remedy == f"apt install tcmalloc; {line}"
    monkeypatch.setenv("LD_PRELOAD", "/x/libiomp5.so")
    finding = device_finding("LD_PRELOAD")
    assert finding.remedy == "apt install tcmalloc"
    assert "as fast" not in finding.value


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


# -- memory of speculation --------------------------------------------------------

SECTION = "Memory of speculation"


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B), encoding="utf-8")
    return tmp_path


def memory_report(*arguments):
    """(the JSON report, its findings about memory by name)."""
    result = run("--json", *map(str, arguments))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    return report, {f["name"]: f for f in report["findings"] if f["section"] == SECTION}


@pytest.mark.slow
def test_memory_of_speculation(model):
    arguments = ("--model", model, "--max-num-seqs", 4, "--nodes", 12, "--block-size", 32)
    report, findings = memory_report(*arguments)
    terms = speculation_bytes(ModelDimensions.from_config(LLAMA_3_8B), 4, 12, block_size=32)
    # KV slot, logits and their copies, activations of Llama-3-8B, see tests/control/test_memory.py
    node = 131072 + 256512 + 3 * 513024 + 229376
    rows = 2**30 // (256512 + 3 * 513024)
    assert report["memory"] == {
        **terms,
        "total": sum(terms.values()),
        "node": node,
        "max_rows": rows,
    }
    assert len(findings) == len(terms) + 3  # every term has a line
    assert findings["KV slots of drafted nodes"]["value"].startswith("16.0 MiB")  # 4 blocks
    assert "2.1 MiB per request: KV slot 128.0 KiB" in findings["a drafted node"]["value"]
    assert f"{rows} have their logits within 1.0 GiB" in findings["verified rows"]["value"]
    assert "at most 52" in findings["verified rows"]["value"]
    assert {f["status"] for f in findings.values()} == {"ok"}

    result = run(*map(str, arguments))
    assert result.exit_code == 0
    for text in (SECTION, "Everything works", *findings):
        assert text in result.output


@pytest.mark.slow
def test_too_many_verified_rows_are_a_warning(model):
    rows = 2**30 // (256512 + 3 * 513024)
    _, findings = memory_report("--model", model, "--max-num-seqs", rows // 8, "--nodes", 7)
    assert findings["verified rows"]["status"] == "ok"
    report, findings = memory_report("--model", model, "--max-num-seqs", rows, "--nodes", 1)
    assert findings["verified rows"]["status"] == "warning"
    assert f"can have {2 * rows} in" in findings["verified rows"]["value"]
    assert "num_speculative_tokens" in findings["verified rows"]["remedy"]
    assert report["works"] is True


@pytest.mark.slow
def test_what_a_budget_holds(model):
    arguments = ("--model", model, "--max-num-seqs", 8, "--budget", 4, "--context", 1024)
    result = run("--json", *map(str, arguments))
    report = json.loads(result.stdout)
    plan = memory.plan(ModelDimensions.from_config(LLAMA_3_8B), 4 * 10**9, 1024, 8)
    assert report["budget"]["nodes"] == plan.nodes > 0
    section = "Within 4 GB beside the weights, texts of 1024 tokens"
    findings = {f["name"]: f for f in report["findings"] if f["section"] == section}
    assert findings["8 nodes each"]["value"] == f"at most {plan.batches[8]} requests"
    assert findings["8 requests"]["value"].startswith(f"trees of {plan.nodes} nodes at most")
    result = run("--json", *map(str, arguments[:-4]), "--budget", "0.5", "--context", "1024")
    (too_many,) = [
        f for f in json.loads(result.stdout)["findings"] if f["name"] == "8 requests"
    ]  # fmt: skip
    assert too_many["status"] == "warning"
    assert "lower --max-num-seqs" in too_many["remedy"]


def test_a_budget_needs_a_model():
    result = run("--budget", "4")
    assert result.exit_code == 2
    assert "needs --model" in result.output


@pytest.mark.slow
def test_memory_per_gpu(model):
    one, _ = memory_report("--model", model)
    two, findings = memory_report("--model", model, "--tensor-parallel-size", 2)
    assert two["memory"]["kv_nodes"] * 2 == one["memory"]["kv_nodes"]
    assert two["memory"]["logits"] == one["memory"]["logits"]
    assert "per GPU" in findings["total"]["value"]


@pytest.mark.slow
def test_memory_defaults_are_the_methods(model):
    nodes = TokenRecyclingConfig().num_speculative_tokens
    assert memory_report("--model", model) == memory_report("--model", model, "--nodes", nodes)
    assert run("--model", str(model), "--nodes", "81").exit_code == 2
    with pytest.raises(ValueError, match="num_speculative_tokens"):
        TokenRecyclingConfig(num_speculative_tokens=81)  # the same limit


def test_without_a_model_nothing_is_said_about_memory():
    report, findings = memory_report()
    assert not findings
    assert set(report) == {"works", "findings"}
    assert SECTION not in run().output


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is not a local folder with a config.json"),
        ("{", "cannot be used"),
        ("[]", "does not hold a JSON object"),
        (json.dumps({**LLAMA_3_8B, "vocab_size": None}), "has no vocab_size"),
    ],
)
def test_model_that_cannot_be_read(monkeypatch, tmp_path, content, problem):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    monkeypatch.setattr(doctor, "examine", lambda: pytest.fail("one error is enough"))
    result = run("--model", str(tmp_path), "--json")
    assert result.exit_code == 2
    assert not result.stdout
    message = " ".join(result.stderr.replace("│", " ").split())  # out of its box
    assert "--model" in message
    assert problem in message


def test_model_of_the_hub_is_not_a_folder():
    result = run("--model", "meta-llama/Llama-3.1-8B")
    assert result.exit_code == 2
    assert "is not a local folder" in " ".join(result.stderr.replace("│", " ").split())


def test_optional_libraries_are_named_with_their_extra(monkeypatch):
    parts = {f.name: f for f in doctor.optional_parts()}
    assert "arctic-inference is not installed" in parts["suffix_tree"].value
    assert "vllm-specplus[suffix]" in parts["suffix_tree"].remedy
    monkeypatch.setattr(doctor, "_version", lambda name: "1.2.3")
    assert all(f.remedy is None and "1.2.3" in f.value for f in doctor.optional_parts())
    assert {f.status for f in doctor.optional_parts()} == {"ok"}


# -- what a model needs -----------------------------------------------------------


def needs_report(monkeypatch, model, found):
    monkeypatch.setattr("vllm_specplus.engine.needs.of_folder", lambda folder: found)
    result = run("--json", "--model", str(model))
    report = json.loads(result.stdout)
    section = {f["name"]: f for f in report["findings"] if f["section"] == "What this model needs"}
    assert report["works"] is (result.exit_code == 0)
    return report["works"], section


def test_a_model_that_needs_nothing_is_served_by_every_method(monkeypatch, model):
    works, section = needs_report(monkeypatch, model, [])
    assert works
    assert set(section) == {"methods"}
    for name in ("token_recycling", "eagle_tree", "draft_tree"):
        assert name in section["methods"]["value"]


def test_what_only_some_methods_serve(monkeypatch, model):
    works, section = needs_report(monkeypatch, model, [Found(Need.MROPE, "type 'qwen2_vl'")])
    assert works
    assert section["MROPE"]["status"] == "ok"
    value = section["MROPE"]["value"]
    assert value.startswith("rotary positions of several axes (M-RoPE): type 'qwen2_vl'; all")
    assert "layer_skip" in value
    assert "layer_skip" not in section["methods"]["value"]
    assert "token_recycling" in section["methods"]["value"]


def test_what_no_method_serves_has_a_remedy(monkeypatch, model):
    found = [Found(Need.SPARSE_ATTENTION, "index_topk=64", "switch it off")]
    works, section = needs_report(monkeypatch, model, found)
    assert not works
    assert section["SPARSE_ATTENTION"]["status"] == "error"
    assert section["SPARSE_ATTENTION"]["remedy"] == "switch it off"
    assert section["methods"]["value"] == "none"


def test_a_config_that_vllm_cannot_read_is_a_warning(monkeypatch, model):
    def unknown(folder):
        raise ValueError("no such architecture\nmore")

    monkeypatch.setattr("vllm_specplus.engine.needs.of_folder", unknown)
    (finding,) = doctor.contract(model)
    assert finding.status == "warning"
    assert finding.value == "vLLM: no such architecture"
