"""How far `vllm-specplus plan` is off: against every speed-up measured here, and published ones.

    python benchmarks/plan_check.py --json benchmarks/results/plan/check.json

Nothing is run: predictions are compared with committed results. What a method's drafts are worth
(tokens per step, nodes per step) depends on model and text and is taken as measured; predicted is
what they cost, and so the speed-up over plain decoding.

*Measured here*: closed loops of `vllm-specplus bench` with text models on CPUs. A CPU has no data
sheet, so bandwidth and arithmetic come from the same session's runs *without* speculation, by load;
where those have one load only, from another session's, scaled to it. Seconds per request and the
price of a prompt's row beside a verified one come from ``benchmarks/data/step_times_cpu.json``,
those of judging from ``step_counts.json``, those of a draft model's pass from
``drafts/draft_cost.json``. Layers in parallel are compared by rounds; messages were calibrated on
the first case, which is not counted.

*Published*: ``benchmarks/data/published_speedups.json``, by data sheets alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from vllm_specplus.planning import rounds, software
from vllm_specplus.planning.devices import DEVICES, Device
from vllm_specplus.planning.passes import Load, Machine, Time
from vllm_specplus.planning.rounds import Round
from vllm_specplus.planning.sizes import Shape

ROOT = Path(__file__).parents[1]
DATA, RESULTS = ROOT / "benchmarks/data", ROOT / "benchmarks/results"
#: Mean tokens of a prompt of Spec-Bench, of the recorded ones (``traces_smollm2.npz``).
PROMPT = 259
CONTEXT = 300
MISS = 0.2
#: SmolLM2-135M, Gemma 3 270M, and the sizes of ``easyspec_cpu.py``'s draft.
SMOLLM2 = Shape(30, 576, 1536, 9, 3, 64, 49152, True)
GEMMA3 = Shape(18, 640, 2048, 4, 1, 256, 262144, True)
RANDOM = Shape(16, 1024, 4096, 16, 4, 64, 8192, False)
#: Sessions: files that one machine wrote in one state, and what their prices come from if they
#: have plain decoding at one load only.
SESSIONS: dict[str, tuple[list[str], str | None]] = {
    "Xeon float32": (["control/cpu_float32", "control/cpu_float32_high"], None),
    "Xeon bfloat16": (["control/cpu_low", "control/cpu_high"], None),
    "EPYC float32": (
        [f"control/float32_epyc_{loads}" for loads in ("1_2", "4_8", "16_32")], None
    ),
    "EPYC float32, one run": (["control/float32_one_run"], None),
    "by load": (["text/by_load"], None),
    "many requests": (["text/many_requests"], None),
    "retrieval": (["retrieval/spec"], "Xeon bfloat16"),
    "retrieval, code": (["retrieval/code"], "Xeon bfloat16"),
    "relaxed": (["acceptance/relaxed_text"], "many requests"),
    "judge": (["acceptance/kl_judge"], "many requests"),
    "Gemma": (["text/gemma3_270m"], "many requests"),
    "layers": (["drafts/layer_skip"], "EPYC float32"),
}  # fmt: skip
NOT_COMPARED = {
    "images, latents": "plan counts text: one token per step and request",
    "serving": "open loops, whose queues plan does not model",
    "retrieval/edits, repeated, rasd_*": "the files do not hold how many nodes were drafted",
    "against_*": "two versions of the same method, without plain decoding",
    "drafts/draft_trees": "tokens per step without times of whole steps",
}


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# -- this machine's prices ----------------------------------------------------


@dataclass(frozen=True)
class Prices:
    """Of a CPU session, beside what a roofline says; seconds."""

    machine: Machine
    request: float
    """Of each request of a step."""
    prompt: float
    """A prompt's row, in units of a verified one."""
    judge_step: float
    judge_request: float

    def row(self, shape: Shape) -> float:
        """One more row of a step."""
        few, more = (self.machine.forward(shape, Load(rows, 1, CONTEXT)).total for rows in (1, 2))
        return more - few

    def plain(self, shape: Shape, requests: int, prompts: float) -> float:
        """Seconds of a token, with its share of reading prompts of ``prompts`` rows per token."""
        step = self.machine.forward(shape, Load(requests, requests, CONTEXT)).total
        return step / requests + self.request + prompts * self.prompt * self.row(shape)

    def drafted(
        self, shape: Shape, requests: int, prompts: float, *, tokens: float, nodes: float,
        draft: float,
    ) -> float:  # fmt: skip
        """The same with ``nodes`` drafted rows and ``tokens`` tokens per step and request."""
        rows = requests * (1 + nodes)
        step = self.machine.forward(shape, Load(rows, requests, CONTEXT)).total
        step += self.judge_step + draft
        step += requests * (self.request + self.judge_request)
        return step / requests / tokens + prompts * self.prompt * self.row(shape)


def cpu(bandwidth: float, flops: float) -> Machine:
    """Without short kernels and launches, which its measured speeds hold already."""
    device = Device(
        "CPU", bandwidth / software.MEMORY_SHARE, flops / software.COMPUTE_SHARE, 0, 1.0, 0.0,
        "measured", overlaps=False,
    )  # fmt: skip
    return Machine(device, software.Software("CPU", True, 0, 0, 0, 0, 0, 0.0))


def host_prices() -> dict[str, float]:
    """Seconds per request and step, and of a prompt's row, by the recorded step times."""
    table = load_json(DATA / "step_times_cpu.json")
    points = [
        (1.0, requests, requests * (1 + nodes), table["seconds"][i][j])
        for i, requests in enumerate(table["requests"])
        for j, nodes in enumerate(table["nodes"])
        if table["seconds"][i][j]
    ]
    features, seconds = np.array([p[:3] for p in points]), np.array([p[3] for p in points])
    solved = np.linalg.lstsq(features / seconds[:, None], np.ones(len(points)), rcond=None)[0]
    counts = load_json(RESULTS / "step_counts.json")["now"]
    judging = ("verify, sampled", "inputs of a tree step")
    one, many = (sum(counts[n][f"{r} x 1k"]["us"] for n in judging) * 1e-6 for r in (1, 64))
    return {
        "request": float(solved[1]),
        "prompt": table["prompt_row_seconds"] / float(solved[2]),
        "judge_step": one,
        "judge_request": (many - one) / 63,
    }


def prices(shape: Shape, runs: list[dict], host: dict[str, float]) -> Prices:
    """Bandwidth and arithmetic that explain plain decoding at these loads best."""
    row = cpu(1.0, 1.0).forward(shape, Load(1, 1, CONTEXT))
    features, seconds = [], []
    for run in runs:
        prompts = prompt_rows(run) * host["prompt"]
        features.append((row.weights / run["concurrency"], row.arithmetic * (1 + prompts)))
        seconds.append(1 / run["tokens_per_s"] - host["request"])
    measured = np.array(seconds)
    slow = np.linalg.lstsq(np.array(features) / measured[:, None], np.ones(len(runs)), rcond=None)
    return Prices(cpu(*(1 / slow[0])), **host)


def scaled(known: Prices, shape: Shape, run: dict) -> Prices:
    """Prices of another session, so that plain decoding at the one load takes what it took."""
    wanted = 1 / run["tokens_per_s"] - known.request
    found = known.plain(shape, run["concurrency"], prompt_rows(run)) - known.request
    device, factor = known.machine.device, found / wanted
    faster = device.measured(device.bandwidth * factor, device.flops * factor)
    return replace(known, machine=replace(known.machine, device=faster))


def prompt_rows(run: dict) -> float:
    """Of prompts, per token that was written."""
    return PROMPT * run["requests"] / run["tokens"]


# -- measured here ------------------------------------------------------------


def shape_of(document: dict) -> Shape:
    return GEMMA3 if "gemma" in document["model"] else SMOLLM2


def nodes_per_step(run: dict) -> float:
    """Of all steps, those without drafts too: what drafts bring, by what steps do."""
    accepted, extra = sum(run["acceptance_per_depth"]), run["tokens_per_step"] - 1
    if '"fixed"' in run["method"]:
        return run["drafted_per_draft"]
    return run["drafted_per_draft"] * min(extra / accepted, 1.0) if accepted else 0.0


def draft_seconds(run: dict, shape: Shape, known: Prices) -> float:
    """Of a step's drafting."""
    config, requests = run["speculative_config"] or {}, run["concurrency"]
    method, load = config.get("method"), Load(requests, requests, CONTEXT)
    passes = config.get("num_speculative_tokens", 0) if nodes_per_step(run) else 0
    if method == "draft_tree":
        setting = load_json(RESULTS / "drafts/draft_cost.json")
        chain = setting["summary"]["0.6"]["chain, token by token"]
        return passes * chain["draft_ms_per_step"] / setting["setting"]["nodes"] / 1e3
    if method in ("layer_skip", "early_exit"):
        share = 1 - config.get("skip_share", 0.45) if method == "layer_skip" else 0.5
        return rounds.own_layers(known.machine, shape, load, 1, share, passes).total
    return rounds.look_up(load).total


def measured_here() -> Iterator[dict]:
    """A line for each speed-up of a closed loop."""
    host, known = host_prices(), {}
    for session, (files, like) in SESSIONS.items():
        documents = {name: load_json(RESULTS / f"{name}.json") for name in files}
        shape = shape_of(documents[files[0]])
        runs = [(name, run) for name, each in documents.items() for run in each["runs"]]
        plain = [run for _, run in runs if run["tokens_per_step"] == 1 and is_plain(run)]
        own = scaled(known[like], shape, plain[0]) if like else prices(shape, plain, host)
        known[session] = own
        for name, run in runs:
            if not is_plain(run):
                yield line_of(name, run, shape, own)


def is_plain(run: dict) -> bool:
    return run["method"].startswith("none")


def line_of(name: str, run: dict, shape: Shape, known: Prices) -> dict:
    requests, prompts, nodes = run["concurrency"], prompt_rows(run), nodes_per_step(run)
    spent = known.drafted(
        shape, requests, prompts, tokens=run["tokens_per_step"], nodes=nodes,
        draft=draft_seconds(run, shape, known),
    )  # fmt: skip
    return compared(
        {"file": name, "method": run["method"], "requests": requests, "nodes": nodes,
         "tokens": run["tokens_per_step"]},
        known.plain(shape, requests, prompts) / spent, run["ratio_vs_none"],
    )  # fmt: skip


def layers_in_parallel() -> Iterator[dict]:
    """Rounds of EasySpec and of tensor parallelism on two cores, in units of one core's."""
    first = load_json(RESULTS / "drafts/easyspec_cpu.json")["times"]
    later = load_json(RESULTS / "drafts/easyspec_cpu_16.json")["times"]
    start = first["2"]
    sent = rounds.messages(RANDOM.layers, 2, split=False)["fuzzy"]
    message = (start["two shards"]["fuzzy_ms"] - start["one core"]["fuzzy_ms"]) / sum(sent.values())
    reduces = 2 * RANDOM.layers
    reduce = (start["tensor parallel"]["fuzzy_ms"] - start["one core"]["fuzzy_ms"]) / reduces
    many = later["groups of 2, 16 texts"]
    one, both = (many[way]["fuzzy_ms"] for way in ("one core", "both cores"))
    computing = one - later["groups of 2, 1 texts"]["one core"]["fuzzy_ms"]
    shares = computing / (computing - (one - both))
    part = RANDOM.attention / RANDOM.layer
    for name, case, texts in (
        ("easyspec_cpu", first["4"], 1), ("easyspec_cpu_16", later["groups of 2, 1 texts"], 1),
        ("easyspec_cpu_16", later["groups of 2, 16 texts"], 16),
    ):  # fmt: skip
        group = 4 if case is first["4"] else 2
        core, saved = case["one core"], (computing if texts > 1 else 0) * (1 - 1 / shares)
        counts = rounds.messages(RANDOM.layers, 2, split=False)
        groups = -(-(RANDOM.layers - 2) // group)
        fuzzy = 2 + 2 * groups
        exact = sum(counts["exact"].values())
        ways = {
            "two shards": (exact * message, fuzzy * message - part * saved),
            "tensor parallel": (reduces * reduce - saved, reduces * reduce - saved),
        }
        for way, (more_exact, more_fuzzy) in ways.items():
            spent = core["exact_ms"] + more_exact + 4 * (core["fuzzy_ms"] + more_fuzzy)
            about = {"file": f"drafts/{name}", "method": f"{way}, groups of {group}"}
            yield compared(
                about | {"requests": texts}, spent / core["round_ms"], case[way]["to_one_core"]
            )


# -- published ----------------------------------------------------------------


def published() -> Iterator[dict]:
    shapes = {
        name: Shape(*sizes)
        for name, sizes in load_json(DATA / "plain_decoding.json")["shapes"].items()
    }
    for row in load_json(DATA / "published_speedups.json")["rows"]:
        running = {"vLLM": software.VLLM, "transformers": software.TRANSFORMERS}[row["software"]]
        found = predicted(row, Machine(DEVICES[row["device"]], running), shapes)
        about = {key: row[key] for key in ("table", "what", "device", "model")}
        yield compared(about, found, row["ratio"])


def predicted(row: dict, machine: Machine, shapes: dict[str, Shape]) -> float:
    target, draft = shapes[row["model"]], shapes.get(row.get("draft", ""))
    requests, levels, devices = row.get("requests", 1), row["levels"], row.get("devices", 1)
    load = Load(requests, requests, 512)
    if row["method"] == "tp_stage":
        alone = Machine(machine.device, replace(machine.software, step=0.0))
        base, more = (rounds.step(alone, target, load, n) for n in (row["base"], devices))
        return base.total / more.total
    if row["method"] == "easyspec_stage":
        one, groups = (
            place(machine, draft, load, devices, levels).total
            for place in (rounds.one_device, rounds.layer_parallel)
        )
        return one / groups
    drafts: dict[str, Any] = {
        "eagle": lambda: rounds.head_drafts(machine, target, load, levels, third=False),
        "eagle3": lambda: rounds.head_drafts(machine, target, load, levels),
        "draft": lambda: rounds.one_device(machine, draft, load, devices, levels),
        "medusa": lambda: rounds.medusa_drafts(machine, target, load, levels),
        "lookup": lambda: rounds.look_up(load),
    }
    spent: Time = drafts[row["method"]]()
    one = Round(spent, rounds.verified(machine, target, load, row["nodes"], devices))
    return row["tokens"] * rounds.step(machine, target, load, devices).total / one.seconds


# -- both ---------------------------------------------------------------------


def compared(about: dict, guess: float, measured: float) -> dict:
    guess = float(guess)
    return about | {"predicted": guess, "measured": measured, "error": guess / measured - 1}


def summary(lines: list[dict]) -> dict[str, float | int]:
    errors = [abs(line["error"]) for line in lines]
    return {
        "count": len(lines),
        "median_error": median(errors),
        "within_20_percent": sum(error <= MISS for error in errors) / len(errors),
        "median_signed": median(line["error"] for line in lines),
    }


def stages() -> Iterator[dict]:
    """A drafting stage of five levels, Llama-3-8B for Llama-3-70B on A100s, by where it runs."""
    shapes = load_json(DATA / "plain_decoding.json")["shapes"]
    draft, load = Shape(*shapes["Llama-3-8B"]), Load(1, 1, 1024)
    for running in (software.VLLM, software.TRANSFORMERS):
        machine = Machine(DEVICES["A100-80GB"], running)
        one = rounds.one_device(machine, draft, load, 1, 5).total
        for devices in (4, 8):
            for name, place in rounds.PLACEMENTS.items():
                spent = place(machine, draft, load, devices, 5)
                yield {
                    "software": running.name, "devices": devices, "placement": name,
                    "ms": 1e3 * spent.total, "gain": one / spent.total,
                    "terms_ms": {key: 1e3 * value for key, value in spent.terms().items()},
                }  # fmt: skip


def report() -> dict:
    """Everything that the result holds beside the command."""
    here = [*measured_here(), *layers_in_parallel()]
    others = list(published())
    tables = {line["table"]: None for line in others}
    return {
        "measured_here": summary(here),
        "published": summary(others),
        "tables": [
            {"table": table} | summary([line for line in others if line["table"] == table])
            for table in tables
        ],
        "sessions": [
            {"file": file} | summary([line for line in here if line["file"] == file])
            for file in dict.fromkeys(line["file"] for line in here)
        ],
        "misses": [line for line in (*here, *others) if abs(line["error"]) > MISS],
        "not_compared": NOT_COMPARED,
        "easyspec_stages": list(stages()),
        "lines": {"measured_here": here, "published": others},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    found = report()
    for part in ("measured_here", "published"):
        print(part, {name: round(value, 3) for name, value in found[part].items()})
    for line in (*found["tables"], *found["sessions"]):
        name = line.get("table") or line["file"]
        print(f"  {name}: {line['count']}, {line['median_error']:.1%}")
    for line in found["misses"]:
        where = line.get("table") or line["file"]
        what = line.get("what") or f"{line['method'][:60]}, {line['requests']} in flight"
        print(f"miss: {where}: {what}: {line['predicted']:.2f}, measured {line['measured']:.2f}")
    command = " ".join(["python", "benchmarks/plan_check.py", *sys.argv[1:]])
    args.json.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": command} | found, indent=1, ensure_ascii=False)
    args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
