"""The first minutes on a GPU: everything that has to be known there, part by part.

    python benchmarks/gpu_day_one.py --out DIR [--parts doctor,kernels,...] [--model DIR]
        [--draft DIR] [--head DIR] [--minutes 9.5] [--rehearse]

Give the same command again until it says that nothing is left: a part that is finished is skipped,
one that failed is tried again, and a command begins no part that it has no time for. Every part
runs in a process of its own and writes DIR/PART.json as its results come; after each part DIR holds
all of them in day_one.json, and in words in day_one.md. ``--rehearse`` runs the same on a CPU, with
tiny models and few rows. ``docs/gpu_day_one.md`` says what the parts are.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TRACES = ROOT / "benchmarks" / "data" / "traces_smollm2.npz"
SHAPED = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 512,
    "max_position_embeddings": 1024, "torch_dtype": "float32",
}  # fmt: skip
NODES = 8
#: Parts that serve the small model with trees of its draft, by the beginnings of their names.
SHAPED_PARTS = ("shape-", "overlap-")
#: Of draft models, whose levels have three nodes unless they draft chains.
DRAFTED = 9
Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Setting:
    """What the parts run on. ``model`` and ``draft`` are a real small model and a draft of it,
    ``head`` an EAGLE-3 head of it."""

    rehearse: bool
    model: str
    draft: str | None = None
    head: str | None = None

    def methods(self, target: str) -> dict[str, dict[str, Any] | None]:
        """Speculative configs by name: vLLM's defaults, vLLM's methods, ours."""
        lookup = {"num_speculative_tokens": NODES, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
        found: dict[str, dict[str, Any] | None] = {
            "none": None,
            "ngram_gpu": {"method": "ngram_gpu", **lookup},
            "suffix": {"method": "suffix"},
            "token_recycling": {"method": "token_recycling"},
            "suffix_tree": {"method": "suffix_tree"},
            "rasd": {"method": "rasd"},
        }
        if target == "small" and self.draft:
            ours = {"model": self.draft, "num_speculative_tokens": DRAFTED}
            found["draft_tree"] = {"method": "draft_tree", **ours}
        if target == "small" and self.head:
            head = {"model": self.head, "num_speculative_tokens": 4}
            found["eagle3"] = {"method": "eagle3", **head}
        if self.rehearse:  # one of vLLM's and one of ours
            kept = ("none", "token_recycling")
            found = {name: config for name, config in found.items() if name in kept}
        return found

    def shapes(self) -> dict[str, dict[str, Any]]:
        """Trees and chains of the same draft with as many nodes, always and where they pay."""
        draft = self.draft or self.model
        config = {"method": "draft_tree", "model": draft, "num_speculative_tokens": DRAFTED}
        fixed = {"control": {"policy": "fixed"}}
        return {
            "chain": config | fixed | {"shape": "chain"},
            "tree": config | fixed | {"shape": "topk"},
            "controlled": config | {"shape": "topk"},
        }


def folder_of(target: str, setting: Setting, folder: Path) -> tuple[str, dict[str, Any]]:
    """The model's folder, and what its engine is told of it."""
    if target == "small":
        return setting.model, {"skip_tokenizer_init": True} if setting.rehearse else {}
    (folder / "config.json").write_text(json.dumps(SHAPED | (TINY if setting.rehearse else {})))
    return str(folder), {"load_format": "dummy", "skip_tokenizer_init": True}


def engine(target: str, config: dict[str, Any] | None, setting: Setting, **fields: Any):
    """An engine as its users start it: vLLM's defaults beside the method."""
    from vllm import LLM

    folder, extra = folder_of(target, setting, Path(tempfile.mkdtemp()))
    if setting.rehearse:
        extra |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 24, "dtype": "float32"}
    defaults = {"max_model_len": 1024 if setting.rehearse else 4096, "disable_log_stats": False}
    return LLM(folder, speculative_config=config, **(defaults | extra | fields))


# -- parts: each gets the setting, writes what it has by ``keep``, and returns its result ----------


def doctor(setting: Setting, keep: Keep) -> dict[str, Any]:
    """Versions and devices, and what will not work; the exit code tells of problems, too."""
    command = [sys.executable, "-m", "vllm_specplus.cli.main", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if not done.stdout.strip().startswith("{"):
        raise RuntimeError(f"doctor said nothing ({done.returncode}): {done.stderr[-2000:]}")
    return {"exit_code": done.returncode, "report": json.loads(done.stdout)}


def kernels(setting: Setting, keep: Keep) -> dict[str, Any]:
    """Our kernels against their references, by the tests: natively where there is a GPU."""
    tests = ["test_move_slots.py"] if setting.rehearse else [""]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-rN"]
    paths = [str(ROOT / "tests" / "kernels" / name) for name in tests]
    done = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise RuntimeError("\n".join(lines[-30:]) + done.stderr[-1000:])
    return {"summary": lines[-1]}


def attention(setting: Setting, keep: Keep) -> dict[str, Any]:
    """Tree attention at the shapes of Llama-3-8B: equality, and times beside causal attention."""
    import torch

    if not torch.cuda.is_available():
        return {"skipped": "no CUDA GPU"}
    import tree_attention_gpu

    rows = []
    for batch in (1, 8, 32):
        for nodes in (8, 32, 64):
            for context in (1024, 8192, 32768):
                try:
                    found = tree_attention_gpu.measure(batch, nodes, context)
                    times = {f"{k} us": round(v, 1) for k, v in found["microseconds"].items()}
                    error = max(found["largest_error"].values())
                except ValueError as wrong:
                    times, error = {"wrong": str(wrong)}, float("inf")
                shape = {"requests": batch, "rows": nodes, "context": context}
                rows.append(shape | times | {"error": error})
                keep({"rows": rows})
    return {"rows": rows}


def lossless(setting: Setting, keep: Keep) -> dict[str, Any]:
    """Token equality with plain decoding in float32, where everything happens in a batch."""
    from vllm_specplus.testing import assert_lossless_greedy

    rows: list[dict[str, Any]] = []
    for name in ("token_recycling",) if setting.rehearse else ("token_recycling", "suffix_tree"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                counters = assert_lossless_greedy({"method": name}, Path(folder))
                row = {key: counters[f"nodes_{key}"] for key in ("drafted", "accepted")}
            except AssertionError as wrong:
                row = {"wrong": str(wrong)}
        rows.append({"method": name} | row)
        keep({"rows": rows})
    if any("wrong" in row for row in rows):
        raise RuntimeError(f"not lossless: {rows}")
    return {"rows": rows}


def time_steps(worker, counts: list[int], contexts: list[int], repeats: int) -> list[dict]:
    """In the worker: milliseconds of forward pass and logits, the fastest of ``repeats``."""
    import torch

    runner, rows = worker.model_runner, []

    def step(count: int, kind: str, context: int) -> float:
        drafted = kind != "plain"
        runner._profiled = kind if drafted else None
        start = time.perf_counter()
        try:
            hidden, _ = runner._dummy_run(
                count, force_attention=True, uniform_decode=drafted, profile_seq_lens=context
            )
        finally:
            runner._profiled = None
        runner._after_forward(hidden[:count])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    for context in contexts:
        for count in counts:
            row: dict[str, Any] = {"context": context, "rows": count}
            for kind in ("plain", "chain", "tree"):
                times = [step(count, kind, context) for _ in range(repeats)]
                row[f"{kind} ms"] = round(min(times), 3)
            rows.append(row)
    return rows


def steps(target: str, setting: Setting, keep: Keep) -> dict[str, Any]:
    """What steps cost by kind, rows and context."""
    config = {"method": "token_recycling", "num_speculative_tokens": NODES - 1}
    llm = engine(target, config | {"control": {"policy": "fixed"}}, setting)
    counts = [8, 16] if setting.rehearse else [8, 16, 32, 64, 128, 256]
    contexts = [64] if setting.rehearse else [128, 1024, 4000]
    rows: list[dict[str, Any]] = []
    for context in contexts:
        arguments = (counts, [context], 2 if setting.rehearse else 10)
        rows += llm.collective_rpc(time_steps, args=arguments)[0]
        keep({"rows": rows})
    return {"rows": rows}


def prompts(vocab: int) -> list[list[int]]:
    """Recorded prompts of Spec-Bench, as ids of SmolLM2."""
    traces = np.load(TRACES)
    texts = [traces[f"prompt_{i}"] for i in range(int(traces["count"]))]
    return [(text % vocab)[:512].tolist() for text in texts]


def counted(llm) -> dict[str, float]:
    """vLLM's own numbers of drafted and accepted tokens."""
    names = {"num_draft_tokens": "drafted", "num_accepted_tokens": "accepted"}
    found = {m.name.removeprefix("vllm:spec_decode_"): m for m in llm.get_metrics()}
    return {short: found[name].value for name, short in names.items() if name in found}


def throughput(
    target: str, config: dict[str, Any] | None, setting: Setting, keep: Keep
) -> dict[str, Any]:
    """Tokens per second of batches of 1, 8 and 32, each prompt asked once in an engine's life."""
    from vllm import SamplingParams, TokensPrompt

    start = time.perf_counter()
    llm = engine(target, config, setting, max_num_seqs=32)
    chosen = llm.llm_engine.vllm_config
    result: dict[str, Any] = {
        "start_s": round(time.perf_counter() - start, 1),
        "async_scheduling": bool(chosen.scheduler_config.async_scheduling),
        "cudagraphs": chosen.compilation_config.cudagraph_mode.name,
        "v2_runner": getattr(chosen, "use_v2_model_runner", None),
        "rows": [],
    }
    texts = iter(prompts(chosen.model_config.get_vocab_size()))
    tokens = 16 if setting.rehearse else 128

    def answer(count: int, length: int) -> tuple[float, list[list[int]]]:
        asked = [TokensPrompt(prompt_token_ids=next(texts)) for _ in range(count)]
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        outputs = llm.generate(asked, params, use_tqdm=False)
        return time.perf_counter() - begin, [list(o.outputs[0].token_ids) for o in outputs]

    answer(2, 16)  # warms up
    for flight, batches in ((1, 2),) if setting.rehearse else ((1, 6), (8, 1), (32, 1)):
        before, seconds, ids = counted(llm), 0.0, []
        for _ in range(batches):
            took, found = answer(flight, tokens)
            seconds, ids = seconds + took, ids + found
        row: dict[str, Any] = {
            "in flight": flight,
            "tokens/s": round(sum(map(len, ids)) / seconds, 1),
        }
        row |= {key: value - before.get(key, 0) for key, value in counted(llm).items()}
        row["answers"] = [hashlib.sha1(str(each).encode()).hexdigest()[:8] for each in ids]
        result["rows"].append(row)
        keep(result)
    return result


def deep_draft(setting: Setting) -> str:
    """Folder of a draft for layers in parallel; of a rehearsal it has layers that make groups."""
    if not setting.rehearse:
        return setting.draft or setting.model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tempfile.mkdtemp()
    LlamaForCausalLM(LlamaConfig(**TINY | {"num_hidden_layers": 6})).save_pretrained(folder)
    return folder


def easyspec(setting: Setting, keep: Keep) -> dict[str, Any]:
    """A draft's exact and fuzzy passes by layers per group, on this device alone: what of a pass
    would be left if the attentions of a group ran at once is its critical path."""
    import torch

    from vllm_specplus.drafting.easyspec import LayerParallelExecutor, Parts, layer_groups
    from vllm_specplus.drafting.model import DraftModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = DraftModel(deep_draft(setting), device, dtype)
    levels, rows = 5, []
    for size in (1, 2) if setting.rehearse else (1, 2, 4, 8):
        parts = Parts(model, layer_groups(model.num_layers, size))
        group_s: list[float] = []
        inner = parts.together

        def timed(layers, hidden, given, inner=inner, group_s=group_s):
            begin = _now(device)
            out = inner(layers, hidden, given)
            group_s.append((_now(device) - begin) / len(layers))
            return out

        parts.together = timed
        executor = LayerParallelExecutor(parts, 4096, levels)
        passes = _chain_passes(executor, prompts(model.config.vocab_size)[0][:64], levels, device)
        exact, fuzzy = (1e3 * float(np.median(part)) for part in zip(*passes, strict=True))
        one = 1e3 * float(np.median(group_s)) if group_s else None
        groups = layer_groups(model.num_layers, size)
        saved = (model.num_layers - len(groups)) * one if one else 0.0
        rows.append({
            "layers per group": size, "exact ms": round(exact, 3), "fuzzy ms": round(fuzzy, 3),
            "one attention ms": one and round(one, 4), "critical path ms": round(fuzzy - saved, 3),
        })  # fmt: skip
        keep({"rows": rows})
    return {"rows": rows}


def placed_draft(setting: Setting, placement: str):
    """A draft on all devices here (four at most), its owners placed by a Ray cluster of its own:
    (its whole model, home's shard, their placement), or why that is not possible."""
    import socket

    import torch

    from vllm_specplus.drafting.graphs import CudaRecorder
    from vllm_specplus.drafting.memory import fingerprint
    from vllm_specplus.drafting.model import DraftModel
    from vllm_specplus.drafting.placement import Placement
    from vllm_specplus.drafting.shards import Plan, Shard
    from vllm_specplus.target import TargetDevice

    on_gpus = torch.cuda.is_available()
    shards = min(torch.cuda.device_count(), 4) if on_gpus else 2
    if shards < 2 or importlib.util.find_spec("ray") is None:
        return "one GPU" if shards < 2 else "Ray is not installed"
    device = torch.device("cuda:0" if on_gpus else "cpu")
    dtype = torch.bfloat16 if on_gpus else torch.float32
    name = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if on_gpus else ""
    uuid = str(torch.cuda.get_device_properties(0).uuid) if on_gpus else ""
    folder = deep_draft(setting)
    plan = Plan(
        folder, fingerprint(folder), str(dtype).removeprefix("torch."), None, 16384, 15, shards,
        shards, placement, on_gpus,
    )  # fmt: skip
    home = TargetDevice(socket.gethostname(), name, uuid)
    placed = Placement(plan, device, targets=[home])
    record = CudaRecorder() if on_gpus else None
    model = DraftModel(folder, device, dtype)
    return model, Shard(plan, model, placed.group, record), placed


def easyspec_shards(setting: Setting, keep: Keep) -> dict[str, Any]:
    """Every placement of a draft on several devices, as the method itself tries them at its start:
    rounds, levels, what they are worth, and what is chosen beside a target of 70B on as many."""
    from vllm_specplus.drafting.trial import try_all

    found = placed_draft(setting, "auto")
    if isinstance(found, str):
        return {"skipped": found}
    model, shard, placed = found
    try:
        target = 140 * 10**9 // placed.plan.shards
        verdict = try_all(
            model, placed.plan.shards, placed.plan.group_size, (3,) * 5, target,
            lambda placement, slots: shard.place(placement, slots, settle=False),
        )  # fmt: skip
    finally:
        placed.close()
    rows = [
        {"placement": name, "texts": load, "round ms": round(1e3 * each.round, 3),
         "level ms": round(1e3 * each.level, 3), "worth": round(verdict.worth[name], 2),
         "chosen": name == verdict.placement}
        for name, loads in verdict.rounds.items()
        for load, each in loads.items()
    ]  # fmt: skip
    return {"rows": rows, "shards": placed.plan.shards, "refused": verdict.refused}


def easyspec_faults(setting: Setting, keep: Keep) -> dict[str, Any]:
    """What a stopped and a killed owner cost: one bounded wait, and nothing left behind."""
    rows: list[dict[str, Any]] = []
    for what in ("SIGSTOP", "SIGKILL"):
        found = placed_draft(setting, "attentions_and_mlps")
        if isinstance(found, str):
            return {"skipped": found}
        model, shard, placed = found
        device, pids = model.device, placed.pids()
        try:
            executor = shard.place("attentions_and_mlps", placed.plan.max_slots)
            text = prompts(model.config.vocab_size)[0][:64]
            _chain_passes(executor, text, 5, device)
            os.kill(pids[0], getattr(signal, what))
            begin = time.perf_counter()
            try:
                _chain_passes(executor, text, 5, device)
                placed.group.check()
                error = "none"
            except RuntimeError as lost:
                error = f"{type(lost).__name__}: {str(lost)[:120]}"
            took = time.perf_counter() - begin
        finally:
            placed.close()
        left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        rows.append({"what": what, "error": error, "seconds": round(took, 1), "left": len(left)})
        keep({"rows": rows})
        if error == "none" or left:
            raise RuntimeError(f"a lost owner did not end as it should: {rows}")
    return {"rows": rows}


def easyspec_ray(setting: Setting, keep: Keep) -> dict[str, Any]:
    """vLLM's Ray executor on two GPUs, and the draft's shards beside its ranks: the texts of the
    same target without drafts."""
    import torch
    from vllm import SamplingParams, TokensPrompt

    if torch.cuda.device_count() < 2:
        return {"skipped": "vLLM's Ray executor takes GPUs only, and needs two"}
    draft = setting.draft or setting.model
    config = {"method": "easyspec", "model": draft, "shards": 2, "group_size": 2, "shape": "topk",
              "share_target": True, "control": {"policy": "fixed"},
              "num_speculative_tokens": DRAFTED}  # fmt: skip
    asked = [TokensPrompt(prompt_token_ids=text[:128]) for text in prompts(512)[:8]]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False)
    answers, rows = [], []
    for spec in (None, config):
        llm = engine(
            "small", spec, setting, tensor_parallel_size=2, dtype="float32", max_num_seqs=8,
            distributed_executor_backend="ray", gpu_memory_utilization=0.5,
        )  # fmt: skip
        begin = time.perf_counter()
        outputs = llm.generate(asked, params, use_tqdm=False)
        rows.append({"drafts": bool(spec), "seconds": round(time.perf_counter() - begin, 2)})
        rows[-1] |= counted(llm)
        answers.append([list(each.outputs[0].token_ids) for each in outputs])
        llm.llm_engine.engine_core.shutdown()
        keep({"rows": rows})
    same = sum(a == b for a, b in zip(*answers, strict=True))
    if same < len(asked):
        raise RuntimeError(f"not lossless: {same} of {len(asked)} answers are the same")
    return {"rows": rows}


def overlap(how: Any, setting: Setting, keep: Keep) -> dict[str, Any]:
    """Trees of the same draft as ``shape-tree``, on a device of its own that Ray finds, where it
    goes on while the target verifies; ``how`` is the key's value."""
    config = setting.shapes()["tree"] | {"overlap": how}
    if setting.rehearse:
        first, *others = sorted(os.sched_getaffinity(0))
        if not others:
            return {"skipped": "the draft needs a core of its own"}
        os.sched_setaffinity(0, {first})
        return throughput("small", config | {"draft_cores": str(others[0])}, setting, keep)
    import torch

    if torch.cuda.device_count() < 2:
        return {"skipped": "the draft needs a GPU of its own, and there is one"}
    return throughput("small", config, setting, keep)


def _now(device) -> float:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def _chain_passes(executor, text: list[int], levels: int, device) -> list[tuple[float, float]]:
    """Seconds of (exact pass, a fuzzy pass) of chains below growing texts."""
    import torch

    passes = []
    for end in range(len(text) - 16, len(text), 2):
        if not executor.room("text", end):
            raise ValueError(f"no room for {end} tokens")
        begin = _now(device)
        logits = executor.begin(["text"], [np.array(text[:end], np.int32)])[:, None]
        exact, fuzzy = _now(device) - begin, []
        for level in range(levels - 1):
            token = logits[:, -1].argmax(-1, keepdim=True)
            begin = _now(device)
            logits = executor.grow(
                torch.arange(1, device=device), token, torch.full_like(token, level - 1)
            )
            fuzzy.append(_now(device) - begin)
        passes.append((exact, float(np.mean(fuzzy))))
    executor.forget("text")
    return passes[1:]


def profile(setting: Setting, keep: Keep) -> dict[str, Any]:
    """Where a step's time goes, by kernel: torch's profiler over an engine with trees."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record
    from vllm import SamplingParams, TokensPrompt

    config = {"method": "token_recycling", "num_speculative_tokens": NODES}
    llm = engine("small", config | {"control": {"policy": "fixed"}}, setting, max_num_seqs=8)
    asked = [TokensPrompt(prompt_token_ids=text[:128]) for text in prompts(512)[:8]]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    llm.generate(asked, params, use_tqdm=False)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with record(activities=activities) as profiler:
        llm.generate(asked, params, use_tqdm=False)
    name = f"self_{'device' if torch.cuda.is_available() else 'cpu'}_time_total"
    events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, name))[:30]
    return {
        "rows": [
            {"kernel": e.key[:80], "calls": e.count, "self us": round(getattr(e, name), 1)}
            for e in events
        ]
    }


Part = Callable[[Setting, Keep], dict[str, Any]]


def parts_of(setting: Setting) -> dict[str, Part]:
    """Every part by name, what matters most first."""

    def served(target: str, config: dict[str, Any] | None) -> Part:
        return lambda s, keep: throughput(target, config, s, keep)

    def costs(target: str) -> Part:
        return lambda s, keep: steps(target, s, keep)

    found: dict[str, Part] = {"doctor": doctor, "kernels": kernels, "lossless": lossless}
    found |= {"attention": attention}
    found |= {f"steps-{target}": costs(target) for target in ("small", "8b")}
    for target in ("small", "8b"):
        for name, config in setting.methods(target).items():
            found[f"{target}-{name}"] = served(target, config)
    for name, config in setting.shapes().items():
        found[f"shape-{name}"] = served("small", config)
    for name, how in (("trees", True), ("paper", "paper")):
        found[f"overlap-{name}"] = partial(overlap, how)
    found |= {"easyspec": easyspec, "easyspec-shards": easyspec_shards}
    found |= {"easyspec-faults": easyspec_faults, "easyspec-ray": easyspec_ray}
    return found | {"profile": profile}


# -- carrying them out -----------------------------------------------------------------------------


def write(path: Path, content: dict[str, Any]) -> None:
    """All of it or nothing: the machine may go at any time."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, default=str) + "\n")
    part.replace(path)


def read(out: Path, name: str) -> dict[str, Any]:
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def carry_out(
    names: Iterable[str], out: Path, execute: Callable[[str], None], deadline: float, longest: float
) -> list[str]:
    """Execute the parts that are not finished; ``execute`` leaves a part's result in its file, or
    raises. Whatever it raises is recorded and the next part goes on. Returns what is left."""
    left: list[str] = []
    for number, name in enumerate(names):
        if read(out, name).get("status") == "done":
            continue
        if left or (number and time.monotonic() + longest / 3 > deadline):
            left.append(name)
            continue
        start = time.monotonic()
        (out / f"{name}.json").unlink(missing_ok=True)
        try:
            execute(name)
            status: dict[str, Any] = {"status": "done"}
        except Exception as error:
            status = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        took = {"seconds": round(time.monotonic() - start, 1)}
        write(out / f"{name}.json", {"part": name} | status | took | read(out, name))
        print(f"{name}: {status['status']} in {took['seconds']} s", flush=True)
    return left


class Child:
    """Executes a part in a process of its own, which is ended with all it started when its time is
    over."""

    def __init__(self, arguments: list[str], deadline: float, longest: float):
        self._arguments, self._deadline, self._longest = arguments, deadline, longest

    def __call__(self, name: str) -> None:
        here = [sys.executable, str(Path(__file__).resolve()), *self._arguments, "--child", name]
        env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        if name.startswith(("steps", "profile")):  # look into the worker
            env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
        path = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        env |= {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                here, stdout=log, stderr=log, env=env, start_new_session=True
            )
            try:
                code = process.wait(max(min(self._longest, self._deadline - time.monotonic()), 60))
            except subprocess.TimeoutExpired:
                raise TimeoutError("the part took too long") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if code:
                log.seek(max(log.seek(0, os.SEEK_END) - 4000, 0))
                end = log.read().decode(errors="replace")
                raise RuntimeError(f"exit code {code}: {end}")


def merge(names: Iterable[str], out: Path) -> None:
    """Write all that there is into one file, and a page of it."""
    found = {name: content for name in names if (content := read(out, name))}
    write(out / "day_one.json", {"parts": found})
    (out / "day_one.md").write_text(page(found))


def page(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: throughputs beside ``none``, the tables of the other parts, what failed."""
    lines = ["# Day one", ""]
    for target in ("small", "8b"):
        of_small = SHAPED_PARTS if target == "small" else ()
        served = [name for name in found if name.startswith((f"{target}-", *of_small))]
        plain = {r["in flight"]: r for r in _rows(found.get(f"{target}-none", {}))}
        rows = []
        for name in served:
            for row in _rows(found[name]):
                base = plain.get(row["in flight"])
                same = [a == b for a, b in zip(row["answers"], base["answers"], strict=False)] \
                    if base else []  # fmt: skip
                rows.append(
                    {"part": name}
                    | {key: value for key, value in row.items() if key != "answers"}
                    | {"to none": round(row["tokens/s"] / base["tokens/s"], 2) if base else ""}
                    | {"equal answers": f"{sum(same)} of {len(same)}"}
                )
        lines += [f"## Throughput, {target}", "", *table(rows), ""] if rows else []
    for name, content in found.items():
        is_served = name.startswith(("small-", "8b-", *SHAPED_PARTS))
        rows = [] if is_served else _rows(content)
        note = content.get("error") or content.get("result", {}).get("skipped")
        if rows or note or not is_served:
            lines += [f"## {name}: {content.get('status')}, {content.get('seconds')} s", ""]
        if note:
            lines += ["```", str(note)[-600:], "```", ""]
        lines += [*table(rows), ""] if rows else []
    return "\n".join(lines) + "\n"


def _rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    return content.get("result", {}).get("rows", [])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown of rows that may lack some of the columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[str(row.get(key, "")).replace("|", "/") for key in columns] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", help="names, or beginnings of names, separated by commas")
    parser.add_argument("--model", help="real small model; by default the demo's")
    parser.add_argument("--draft", help="draft of that model; without it, it drafts for itself")
    parser.add_argument("--head", help="EAGLE-3 head of that model")
    parser.add_argument("--minutes", type=float, default=9.5, help="for this command")
    parser.add_argument("--rehearse", action="store_true", help="tiny models, on the CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def small_model(args: argparse.Namespace) -> str:
    if args.model:
        return args.model
    if args.rehearse:
        folder = args.out / "tiny"
        if not (folder / "config.json").exists():
            from vllm_specplus.testing.models import build_model

            build_model(folder)
        return str(folder)
    from vllm_specplus.cli.model import prepare_model

    return str(prepare_model())


def main() -> None:
    args = options().parse_args()
    begin = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(args.rehearse, small_model(args), args.draft, args.head)
    parts = parts_of(setting)
    if args.child:
        path = args.out / f"{args.child}.json"
        write(path, {"result": parts[args.child](setting, lambda r: write(path, {"result": r}))})
        return
    wanted = tuple((args.parts or "").split(","))
    names = [name for name in parts if name.startswith(wanted)]
    if not names:
        raise SystemExit(f"no part begins with {args.parts!r}: there are {', '.join(parts)}")
    deadline, longest = begin + 60 * args.minutes, 60 * args.minutes
    given = {
        "--out": args.out,
        "--model": setting.model,
        "--draft": args.draft,
        "--head": args.head,
    }
    arguments = [str(each) for pair in given.items() if pair[1] for each in pair]
    child = Child(arguments + ["--rehearse"] * args.rehearse, deadline, longest)

    def execute(name: str) -> None:
        try:
            child(name)
        finally:
            merge(parts, args.out)

    left = carry_out(names, args.out, execute, deadline, longest)
    merge(parts, args.out)
    print(f"left: {', '.join(left)}" if left else "nothing is left")


if __name__ == "__main__":
    main()
