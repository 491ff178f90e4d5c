"""benchmarks/gpu_day_one.py: what is skipped, recorded and left; and its rehearsal on the CPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_day_one.py"


@pytest.fixture(scope="module")
def day_one():
    spec = importlib.util.spec_from_file_location("gpu_day_one", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Parts:
    """Executes parts in memory; one of them fails half-way as long as it is ``broken``."""

    def __init__(self, day_one, out: Path):
        self._day_one, self._out = day_one, out
        self.executed: list[str] = []
        self.broken = "b"

    def __call__(self, name: str) -> None:
        self.executed.append(name)
        path = self._out / f"{name}.json"
        self._day_one.write(path, {"result": {"rows": [{"half": 1}]}})
        if name == self.broken:
            raise RuntimeError("the kernel is wrong")
        self._day_one.write(path, {"result": {"rows": [{"half": 1}, {"whole": 2}]}})


def run(day_one, parts: Parts, out: Path, seconds: float = 1000.0, longest: float = 10.0):
    deadline = time.monotonic() + seconds
    return day_one.carry_out(["a", "b", "c"], out, parts, deadline, longest)


def test_a_failing_part_is_recorded_with_what_it_had_and_the_next_goes_on(day_one, tmp_path):
    parts = Parts(day_one, tmp_path)
    assert run(day_one, parts, tmp_path) == []
    assert parts.executed == ["a", "b", "c"]
    failed = json.loads((tmp_path / "b.json").read_text())
    assert failed["status"] == "failed"
    assert failed["error"] == "RuntimeError: the kernel is wrong"
    assert failed["result"] == {"rows": [{"half": 1}]}
    assert json.loads((tmp_path / "c.json").read_text())["status"] == "done"


def test_a_resumed_run_skips_what_is_finished_and_repeats_what_failed(day_one, tmp_path):
    parts = Parts(day_one, tmp_path)
    run(day_one, parts, tmp_path)
    parts.broken, parts.executed = "", []
    run(day_one, parts, tmp_path)
    assert parts.executed == ["b"]
    again = json.loads((tmp_path / "b.json").read_text())
    assert again["status"] == "done"
    assert "error" not in again
    run(day_one, parts, tmp_path)
    assert parts.executed == ["b"]


def test_a_part_that_was_cut_off_with_the_machine_is_repeated(day_one, tmp_path):
    day_one.write(tmp_path / "a.json", {"result": {"rows": []}})  # kept, never finished
    parts = Parts(day_one, tmp_path)
    run(day_one, parts, tmp_path)
    assert parts.executed == ["a", "b", "c"]


def test_without_time_the_first_part_is_done_and_the_others_are_left(day_one, tmp_path):
    parts = Parts(day_one, tmp_path)
    assert run(day_one, parts, tmp_path, seconds=1.0) == ["b", "c"]
    assert parts.executed == ["a"]
    assert run(day_one, parts, tmp_path) == []
    assert parts.executed == ["a", "b", "c"]


def test_all_is_merged_into_one_file_and_one_page(day_one, tmp_path):
    parts = Parts(day_one, tmp_path)
    run(day_one, parts, tmp_path)
    answers = {"answers": ["x", "y"], "drafted": 40}
    for name, speed, second in (("small-none", 10.0, "y"), ("small-rasd", 15.0, "z")):
        row = {"in flight": 8, "tokens/s": speed} | answers | {"answers": ["x", second]}
        content = {"status": "done", "seconds": 1.0, "result": {"rows": [row]}}
        day_one.write(tmp_path / f"{name}.json", content)
    day_one.merge(["a", "b", "missing", "small-none", "small-rasd"], tmp_path)
    merged = json.loads((tmp_path / "day_one.json").read_text())["parts"]
    assert list(merged) == ["a", "b", "small-none", "small-rasd"]
    page = (tmp_path / "day_one.md").read_text()
    assert "RuntimeError: the kernel is wrong" in page
    assert "| small-rasd | 8 | 15.0 | 40 | 1.5 | 1 of 2 |" in page


def test_every_config_of_ours_is_one_that_we_accept(day_one, tmp_path):
    from vllm_specplus import registry
    from vllm_specplus.config import parse
    from vllm_specplus.testing.models import build_model

    model = build_model(tmp_path)
    setting = day_one.Setting(rehearse=False, model=model, draft=model, head=model)
    configs = [*setting.methods("small").values(), *setting.shapes().values()]
    ours = [c for c in configs if c and c["method"] in registry.method_names()]
    assert len(ours) == 7
    for config in ours:
        parse(config)


def rehearsed(names: list[str], folder: Path) -> dict[str, dict]:
    """The parts that begin with ``names``, in processes of their own, as on the day."""
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(folder)]
    done = subprocess.run(
        [*command, "--parts", ",".join(names), "--minutes", "20"],
        capture_output=True, text=True, timeout=1300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "nothing is left"
    return json.loads((folder / "day_one.json").read_text())["parts"]


@pytest.mark.engine
def test_the_rehearsal(tmp_path):
    """A part of each kind; but doctor, kernels and lossless, which are tests already."""
    names = ["attention", "steps-8b", "shape-tree", "profile"]
    parts = rehearsed(names, tmp_path)
    assert {name: part.get("error") for name, part in parts.items()} == dict.fromkeys(names)
    for name in ("steps-8b", "shape-tree", "profile"):
        assert parts[name]["result"]["rows"]


@pytest.mark.engine
@pytest.mark.full(
    "benchmarks/gpu_day_one.py", "vllm_specplus/drafting/*.py", "vllm_specplus/overlap/*.py",
    "vllm_specplus/proposers/easyspec.py",
)  # fmt: skip
def test_the_rehearsal_of_drafts_in_processes_of_their_own(tmp_path):
    names = ["overlap-trees", "easyspec"]
    several = ["easyspec-faults", "easyspec-ray", "easyspec-shards"]  # begin with easyspec
    parts = rehearsed(names, tmp_path)
    assert {name: parts[name].get("error") for name in names + several} == dict.fromkeys(
        names + several
    )
    assert parts["easyspec"]["result"]["rows"]
    assert "GPUs only" in parts["easyspec-ray"]["result"]["skipped"]
    if importlib.util.find_spec("ray"):
        assert sum(row["chosen"] for row in parts["easyspec-shards"]["result"]["rows"]) == 2
        assert [row["left"] for row in parts["easyspec-faults"]["result"]["rows"]] == [0, 0]
    alone, grouped = parts["easyspec"]["result"]["rows"]
    assert alone["one attention ms"] is None
    assert grouped["critical path ms"] < grouped["fuzzy ms"]
