"""What drafts with the target's own layers, or leaves it early, beside a draft model.

    python benchmarks/self_speculation.py --model DIR --draft DIR --head FILE --predictors FILE \\
        --dataset question.jsonl --out FOLDER [--limit 24] [--max-tokens 128]

``--model`` is the embedded model, or what ``vllm-specplus train layerskip`` has made of it;
``--draft`` a draft of its tokenizer, ``--head`` and ``--predictors`` what ``train acceptance_head``
and ``train spec_ee`` have made for both. One run of ``vllm-specplus bench`` each, at one and eight
requests in flight, every method in the form of its paper and, where that is another one, in ours:

* ``compiled.json``: without ``spec_ee``, for which vLLM cannot compile the target;
* ``eager.json``: all of them, with ``enforce_eager``.

``projected.json``: where a method cannot pay on a small model, what its measured acceptance would
bring on Llama-2-7B and an H100, one request at a time. A pass there takes the time in which its
weights are read: of a draft level those of the layers that it runs and of the output layer, of a
verification all of them, whatever the number of its rows. No overhead is counted: it is a bound
from above, not a prediction.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Bytes per second that an H100 (SXM) reads from its memory.
H100 = 3.35e12
FIXED = {"policy": "fixed"}
CHAIN = {"shape": "chain", "num_speculative_tokens": 8}


@dataclass(frozen=True)
class Sizes:
    """Of a target, in parameters."""

    layers: int
    layer: int
    head: int

    def seconds(self, share: float, bandwidth: float = H100, bytes_each: int = 2) -> float:
        """Of a pass that runs a ``share`` of the layers."""
        return bytes_each * (share * self.layers * self.layer + self.head) / bandwidth


LLAMA_2_7B = Sizes(32, 4 * 4096**2 + 3 * 4096 * 11008, 32000 * 4096)


def projected(acceptance: list[float], share: float, sizes: Sizes = LLAMA_2_7B) -> float:
    """Speed relative to no drafts of chains as long as ``acceptance``: the share of drafts of which
    at least 1, 2, ... tokens were accepted; drafted by a ``share`` of the layers."""
    tokens = 1 + sum(acceptance)
    seconds = len(acceptance) * sizes.seconds(share) + sizes.seconds(1.0)
    return tokens * sizes.seconds(1.0) / seconds


def best_projected(acceptance: list[float], share: float) -> dict[str, float]:
    """At the number of levels that would be best there."""
    found = {n: projected(acceptance[:n], share) for n in range(len(acceptance) + 1)}
    levels = max(found, key=lambda n: found[n])
    return {"levels": levels, "speed": found[levels], "share_of_layers": share}


def method(name: str, **keys: Any) -> str:
    """As ``bench --methods`` takes it."""
    return ":".join([name, *(f"{key}={json.dumps(value)}" for key, value in keys.items())])


def methods(args: argparse.Namespace, eager: bool) -> list[str]:
    """What is compared."""
    chain = CHAIN | {"control": FIXED}
    draft = {"model": str(args.draft)}
    head = {"rule": "acceptance_head", "head": str(args.head), "threshold": 0.3}
    found = [
        "none",
        method("early_exit", **chain, stop={"rule": "tau"}),
        method("early_exit", **CHAIN, stop={"rule": "tau"}),
        method("early_exit", **chain, statistics="replay"),
        method(
            "layer_skip", search="swift", shape="caterpillar", num_speculative_tokens=80,
            stop={"rule": "confidence"}, control=FIXED,
        ),
        method("layer_skip", **chain, stop={"rule": "adaptive_confidence"}),
        method("layer_skip", **CHAIN, stop={"rule": "adaptive_confidence"}),
        *(method("draft_tree", **draft, **chain | {"num_speculative_tokens": n})
          for n in (2, 4, 8, 16)),
        method("draft_tree", **draft, **chain | {"num_speculative_tokens": 20}, stop=head),
        method("draft_tree", **draft),
    ]  # fmt: skip
    if eager:
        drafts = {"method": "draft_tree", "shape": "topk", "width": 4, **draft}
        found += [
            method(
                "spec_ee", num_speculative_tokens=nodes, draft=drafts, allow_lossy=True,
                predictors=str(args.predictors),
            )
            for nodes in (4, 12)
        ]  # fmt: skip
    return found


def bench(args: argparse.Namespace, eager: bool, out: Path) -> dict[str, Any]:
    """One run; its report."""
    command = [
        sys.executable, "-m", "vllm_specplus.cli.main", "bench", "--model", str(args.model),
        "--dataset", str(args.dataset), "--methods", ",".join(methods(args, eager)),
        "--concurrency", "1,8", "--limit", str(args.limit), "--max-tokens", str(args.max_tokens),
        "--engine-arg", "kv_cache_memory_bytes=1073741824", "--engine-arg", "dtype=float32",
        "--json", str(out),
    ]  # fmt: skip
    if eager:
        command += ["--engine-arg", "enforce_eager=true"]
    subprocess.run(command, check=True)
    return json.loads(out.read_text(encoding="utf-8"))


def shares(config: dict[str, Any], layers: int) -> list[float]:
    """Of its layers, what a draft of one's own runs: of early_exit the first and the last exit."""
    if config["method"] == "layer_skip":
        blocks = 2 * (layers - 2)
        return [1 - int(blocks * config.get("skip_share", 0.45)) / (2 * layers)]
    exits = config.get("exit_layers") or [layers // 4, 3 * layers // 4]
    return [exits[0] / layers, exits[-1] / layers]


def main() -> None:
    """Measures, and writes the three files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in ("model", "draft", "head", "predictors", "dataset", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    compiled = bench(args, False, args.out / "compiled.json")
    bench(args, True, args.out / "eager.json")
    rows = []
    for run in compiled["runs"]:
        config = run["speculative_config"] or {}
        own = config.get("method") in ("early_exit", "layer_skip")
        if not own or run["concurrency"] != 1 or not run["acceptance_per_depth"]:
            continue
        for share in shares(config, layers):
            found = best_projected(run["acceptance_per_depth"], share)
            rows.append({"method": run["method"], **found})
    report = {
        "model": args.model.name, "command": f"python {' '.join(sys.argv)}",
        "projected_on": "Llama-2-7B in 16 bits, H100 SXM, one request", "runs": rows,
    }  # fmt: skip
    (args.out / "projected.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
