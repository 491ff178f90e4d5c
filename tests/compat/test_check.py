"""The check against vLLM's source, on vLLM as it is and with something planted in it or in us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_specplus import compat
from vllm_specplus.compat.usage import examine

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "check_vllm.py"


def report_with(overlay: dict[str, str]):
    return examine(compat.installed_vllm(), ROOT / "vllm_specplus", overlay)


def text_of(module: str) -> str:
    parts = module.split(".")
    folder = compat.installed_vllm().parent if parts[0] == "vllm" else ROOT
    path = folder.joinpath(*parts)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def report():
    return compat.check()


@pytest.mark.slow
def test_the_installed_vllm_has_all_we_take(report):
    assert report.problems == []
    # Only what can be told is checked: it must not silently become little.
    assert report.counts["imports"] > 100
    assert report.counts["overrides"] > 50
    assert report.counts["calls"] > 120
    assert report.counts["attributes"] > 800


def test_whatever_we_replace_is_listed(report):
    patched = {target for target, _ in report.patches}
    assert {
        "vllm.engine.arg_utils.EngineArgs.create_speculative_config",
        "vllm.engine.arg_utils.EngineArgs.create_engine_config",
        "vllm.sampling_params.SamplingParams.verify",
        "vllm.sampling_params.SamplingParams._validate_spec_decode",
        "vllm.v1.worker.cpu_worker.CPUModelRunner",
        "llvmlite.binding.ffi._lib_wrapper.__getattr__",
    } <= patched


RUNNER = "vllm.v1.worker.gpu_model_runner"
#: Renamed in vLLM: (module, old text, new text), and the words of the problem.
IN_VLLM = {
    "an imported function": (
        ("vllm.utils.math_utils", "def cdiv(", "def divide_up("),
        ("vllm.utils.math_utils.cdiv: does not exist",),
    ),
    "a function imported within a function": (
        ("vllm.tokenizers", "cached_tokenizer_from_config", "cached_tokenizer"),
        ("vllm.tokenizers.cached_tokenizer_from_config: does not exist",),
    ),
    "a method whose override calls it": (
        (RUNNER, "def _prepare_inputs(", "def _prepare_the_inputs("),
        ("._prepare_inputs: does not exist",),
    ),
    "a method whose override stands alone": (
        (RUNNER, "def _calc_spec_decode_metadata(", "def _calc_metadata("),
        ("GPUModelRunner._calc_spec_decode_metadata: is not there to be overridden",),
    ),
    "a parameter of an overridden method": (
        (
            RUNNER,
            "_on_request_state_removed(\n        self,\n        req_id: str,",
            "_on_request_state_removed(\n        self,\n        name: str,",
        ),
        ("_on_request_state_removed: our override does not fit", "'name', ours 'req_id'"),
    ),
    "one more parameter of an overridden method": (
        (
            "vllm.v1.attention.backends.cpu_attn",
            "        output_block_scale: torch.Tensor | None = None,\n",
            "        output_block_scale: torch.Tensor | None = None,\n        sink=None,\n",
        ),
        ("CPUAttentionBackendImpl.forward: our override does not fit", "'sink' is none of ours"),
    ),
    "an attribute of the runner": (
        (RUNNER, "self.discard_request_mask", "self.discarded_mask"),
        ("discard_request_mask: does not exist",),
    ),
    "an attribute of the input batch": (
        ("vllm.v1.worker.gpu_input_batch", "num_computed_tokens_cpu", "computed_cpu"),
        ("num_computed_tokens_cpu: does not exist",),
    ),
    "a field of the scheduler's output": (
        ("vllm.v1.core.sched.output", "scheduled_spec_decode_tokens", "scheduled_drafts"),
        ("SchedulerOutput.scheduled_spec_decode_tokens: does not exist",),
    ),
    "a field of the attention metadata": (
        ("vllm.v1.attention.backend", "block_table_tensor", "block_tables"),
        ("CommonAttentionMetadata.block_table_tensor: ",),
    ),
    "a field of the sampling metadata": (
        ("vllm.v1.sample.metadata", "max_num_logprobs", "most_logprobs"),
        ("SamplingMetadata.max_num_logprobs: does not exist",),
    ),
    "a field of a configuration": (
        ("vllm.config.parallel", "worker_cls", "worker_class"),
        ("ParallelConfig.worker_cls: does not exist",),
    ),
    "a parameter of a function that is called": (
        (
            "vllm.v1.sample.ops.topk_topp_sampler",
            "    logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None\n",
            "    logits: torch.Tensor, k: torch.Tensor | None\n",
        ),
        ("apply_top_k_top_p: it takes 2 positional arguments, 3 are given",),
    ),
    "a function that we replace": (
        (
            "vllm.engine.arg_utils",
            "        target_parallel_config: ParallelConfig,\n",
            "        target_parallel_config: ParallelConfig,\n        more: int,\n",
        ),
        ("EngineArgs.create_speculative_config", "'more'"),
    ),
}


@pytest.fixture(scope="module")
def problems_of_a_changed_vllm():
    """One vLLM with all of it."""
    overlay: dict[str, str] = {}
    for (module, old, new), _ in IN_VLLM.values():
        text = overlay.get(module) or text_of(module)
        assert old in text
        overlay[module] = text.replace(old, new)
    return [str(problem) for problem in report_with(overlay).problems]


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_VLLM)
def test_what_vllm_has_no_more_is_reported(name, problems_of_a_changed_vllm):
    words = IN_VLLM[name][1]
    found = [p for p in problems_of_a_changed_vllm if all(word in p for word in words)]
    assert found, problems_of_a_changed_vllm
    for problem in found:
        file, line, _ = problem.split(":", 2)
        assert (ROOT / file).is_file()
        assert int(line) > 0


CODE = """
import vllm.nowhere
from vllm.v1.core.sched.scheduler import Scheduler
try:
    from vllm.utils import moved_away
except ImportError:
    from vllm.utils.math_utils import cdiv
try:
    from vllm.utils import gone_here
except ImportError:
    from vllm.utils import gone_there

def f(vllm_config, scheduler: Scheduler):
    vllm_config.model_config.nonsense
    scheduler.kv_cache_manager.get_block_ids(request="a")
    vllm_config.model_config.get_vocab_size(1, 2, 3)
    getattr(vllm_config, "may_be_missing", None)

class Ours(Scheduler):
    def schedule(self, other):
        self.own = self.running
        return super().reschedule()
"""
#: Lines of CODE that are wrong, and their words.
WRONG = {
    2: "vllm.nowhere: no such module",
    9: "vllm.utils.gone_here: does not exist",
    11: "vllm.utils.gone_there: does not exist",
    14: "ModelConfig.nonsense: does not exist",
    15: "KVCacheManager.get_block_ids: it has no parameter 'request'",
    16: "ModelConfig.get_vocab_size: it takes 0 positional arguments, 3 are given",
    20: "Scheduler.schedule: our override does not fit",
    21: "attribute",
    22: "Scheduler.reschedule: does not exist",
}


def test_what_we_get_wrong_is_reported_with_its_line(tmp_path):
    package = tmp_path / "planted"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "module.py").write_text(CODE)
    report = examine(compat.installed_vllm(), package, package="planted")
    found = {p.place: str(p) for p in report.problems}
    for line, words in WRONG.items():
        if line != 21:  # what the class keeps for itself is nothing of vLLM's
            assert words in found.pop(f"planted/module.py:{line}")
    own = found.pop("planted/module.py:21")
    assert "own: is not there to be overridden, and nothing of ours uses it" in own
    assert found == {}


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_the_script_on_the_installed_vllm():
    done = run("--installed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no problems" in done.stdout


@pytest.mark.slow
def test_the_script_fails_with_a_line_for_each_problem(tmp_path):
    # A vLLM in which one module is missing.
    vllm = tmp_path / "vllm"
    vllm.mkdir()
    for path in compat.installed_vllm().iterdir():
        (vllm / path.name).symlink_to(path)
    (vllm / "v1").unlink()
    (vllm / "v1").mkdir()
    for path in (compat.installed_vllm() / "v1").iterdir():
        if path.name != "outputs.py":
            (vllm / "v1" / path.name).symlink_to(path)
    done = run("--folder", str(vllm))
    assert done.returncode == 1
    assert "vllm.v1.outputs: no such module" in done.stdout


def test_the_script_without_a_vllm_says_what_to_name(tmp_path):
    assert "name a vLLM: --installed, --wheel VERSION or --folder FOLDER" in run().stderr
    assert "is not the folder of a vLLM" in run("--folder", str(tmp_path)).stderr
