"""Expected tokens per step of draft-tree shapes and verification rules, on the same texts.

    python benchmarks/expected_acceptance.py --model DIR --draft DIR --dataset question.jsonl \\
        --out benchmarks/results/drafts/expected_acceptance.json

``draft_trees.py`` counts what engines accept, each on the text it happens to write: honest,
and noisy. Here one engine writes texts without drafts' help, and every shape then drafts a
tree at every place of those texts, inside an engine that is made to write them again. Of each
tree the expected number of accepted tokens is computed, and the code that serves judges it
once: the two means must agree (at temperature 0 they are the same). A place is a step that all
shapes have in common: their
differences are paired by question, and the intervals (95 %) are over questions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from draft_trees import chats, options

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

#: The rules that judge each shape's trees.
RULES = {
    "chain": {"token by token": "without_replacement", "block": "block"},
    "spectr": {"recursive": "with_replacement", "k-SEQ": "k_seq"},
    "rsd_c": {"recursive": "without_replacement", "traversal": "traversal"},
    "rsd_s": {"recursive": "without_replacement", "traversal": "traversal"},
}
#: Whose differences to the others are reported.
BASES = ("chain, token by token", "chain, block", "spectr, recursive", "spectr, k-SEQ")


def chosen(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Of RULES, those asked for."""
    wanted = args.rules or [f"{shape}, {label}" for shape in RULES for label in RULES[shape]]
    rules = {
        shape: {label: rule for label, rule in each.items() if f"{shape}, {label}" in wanted}
        for shape, each in RULES.items()
    }
    return {shape: each for shape, each in rules.items() if each}


def engine(args: argparse.Namespace, speculative: dict | None):
    from vllm import LLM

    return LLM(
        model=args.model, max_model_len=2048, kv_cache_memory_bytes=1 << 30, max_num_seqs=16,
        seed=args.seed, speculative_config=speculative,
    )  # fmt: skip


def write(args: argparse.Namespace) -> dict[str, list]:
    """temperature -> one (prompt ids, output ids) per question, of plain decoding."""
    from vllm import SamplingParams

    llm, texts = engine(args, None), {}
    for temperature, count in zip(args.temperatures, args.questions, strict=True):
        params = SamplingParams(
            temperature=temperature, top_p=args.top_p, max_tokens=args.max_tokens
        )
        texts[str(temperature)] = [
            (list(out.prompt_token_ids), list(out.outputs[0].token_ids))
            for out in llm.chat(chats(args.dataset, count), params, use_tqdm=False)
        ]
    return texts


def expected_tokens(rule: str, p, rows, draft_probs) -> np.ndarray:
    """Of the step, for every request, float64 [R]; arguments as of ``SampledRule.verify``, of trees
    whose nodes were all drawn."""
    if rule in ("block", "traversal"):
        return _of_whole_trees(rule, p, rows, draft_probs)
    return np.add.reduceat(_reach(rule, p, rows, draft_probs), rows.starts[:-1])


def _reach(rule: str, p, rows, draft_probs) -> np.ndarray:
    """How probably the walk from the root gets to each row, float64 [L]."""
    from vllm_specplus.samplers.sampled import best_rho

    out = np.zeros(len(rows.tokens))
    children: list[list[int]] = [[] for _ in out]
    first = np.repeat(rows.starts[:-1], np.diff(rows.starts))
    for row in np.flatnonzero(rows.parents >= 0).tolist():
        children[first[row] + rows.parents[row]].append(row)
    out[rows.starts[:-1]] = 1.0
    for row, mine in enumerate(children):
        if not mine or out[row] == 0.0:
            continue
        left, q = p[row].double(), draft_probs.q[int(draft_probs.index[row])].double()
        left = left[: len(q)].clone()  # no draft has the tokens beyond
        rho = best_rho(left, q, len(mine)) if rule == "k_seq" else 1.0
        rejected, firsts = out[row], {}
        for child in mine:
            token = int(rows.tokens[child])
            drawn = float(q[token])
            accepts = min(float(left[token]) / (rho * drawn), 1.0) if drawn > 0.0 else 0.0
            out[firsts.setdefault(token, child)] += rejected * accepts
            rejected *= 1.0 - accepts
            if rule != "k_seq":
                rest = 1.0 - float(torch.minimum(left, q).sum())  # of all of p
                left = (left - q).clamp_(min=0.0) / rest if rest > 0.0 else left
            if rule == "without_replacement":
                q[token] = 0.0
                q /= q.sum().clamp(min=1e-300)
    return out


class _Test:
    """Stands in for the noise of a row: fails, and notes how probably it would have passed."""

    def __init__(self, row: int, noted: list[tuple[int, float]]):
        self._row, self._noted = row, noted

    def __lt__(self, passes: float) -> bool:
        self._noted.append((self._row, min(max(passes, 0.0), 1.0)))
        return False


def _of_whole_trees(rule: str, p, rows, draft_probs) -> np.ndarray:
    """What these rules test, and in which order, does not depend on the noise: as long as
    tests fail, all follow."""
    from vllm_specplus.samplers.registry import rule_class
    from vllm_specplus.samplers.sampled import Tree

    out = np.ones(len(rows.starts) - 1)
    noted: list[tuple[int, float]] = []
    tests = [_Test(row, noted) for row in range(len(rows.tokens))]
    for r in range(len(out)):
        noted.clear()
        rule_class(rule)().walk(
            Tree(p, rows, draft_probs, tests, *map(int, rows.starts[r : r + 2]))
        )
        if rule == "block":
            noted.reverse()  # the last test that passes counts
        failed = 1.0
        for row, passes in noted:
            out[r] += failed * passes * rows.depths[row]
            failed *= 1.0 - passes
    return out


class Replay:
    """Stands in for the engine's verification: judges every tree, then has the engine go on by
    one token of the text it is to write."""

    def __init__(self, runner, rules: dict[str, str]):
        from vllm_specplus.samplers import lossless
        from vllm_specplus.samplers.registry import rule_class
        from vllm_specplus.samplers.sampled import SampledRule

        self._runner = runner
        self._rules = {label: rule_class(name)() for label, name in rules.items()}
        self._accept = lossless.accept
        SampledRule.verify = lambda rule, *step: self.verify(*step)
        lossless.accept = self.accept
        self.texts: dict[tuple[int, ...], list[int]] = {}
        """Prompt -> what to write, the end of text included."""
        self.tokens: dict[str, dict[tuple[int, ...], list[tuple[float, int]]]] = {}
        """Rule -> prompt -> the step's tokens at every place: expected, and as judged once."""

    def verify(self, p, rows, draft_probs, accept_noise, output_noise, relaxation=None):
        """In the place of ``SampledRule.verify``, of requests that sample."""
        drafted = np.diff(rows.starts) > 1
        for label, judge in self._rules.items() if drafted.any() else ():
            noise = torch.rand(len(rows.tokens)), torch.rand(len(drafted))
            outcome = judge.reference(p, rows, draft_probs, *noise).numpy()
            expected = expected_tokens(judge.name, p, rows, draft_probs)
            self._note(label, rows, expected, self._accept(rows, outcome).lengths)
        return torch.from_numpy(self._go_on(rows))

    def accept(self, rows, outcome):
        """In the place of ``lossless.accept``; of greedy requests, it judges too."""
        if (self._runner.input_batch.temperature_cpu[: len(rows.starts) - 1] == 0).any():
            lengths = self._accept(rows, outcome).lengths
            for label in self._rules:
                self._note(label, rows, lengths, lengths)
            outcome = self._go_on(rows)
        return self._accept(rows, outcome)

    def _states(self) -> list:
        return [self._runner.requests[name] for name in self._runner.input_batch.req_ids]

    def _note(self, label: str, rows, expected: np.ndarray, judged: np.ndarray) -> None:
        found = self.tokens.setdefault(label, {})
        for r, state in enumerate(self._states()):
            if rows.starts[r + 1] - rows.starts[r] > 1:
                found.setdefault(tuple(state.prompt_token_ids), []).append(
                    (float(expected[r]), int(judged[r]))
                )

    def _go_on(self, rows) -> np.ndarray:
        """Each text's next token at its root, and nothing accepted: int32 [L]."""
        out = np.full(len(rows.tokens), -1, np.int32)
        for r, state in enumerate(self._states()):
            text = self.texts[tuple(state.prompt_token_ids)]
            out[rows.starts[r]] = text[min(len(state.output_token_ids), len(text) - 1)]
        rows.tokens[rows.parents >= 0] = -1  # no draft has this token
        return out


def replay(args: argparse.Namespace, shape: str, texts: dict[str, list]) -> dict[str, dict]:
    """temperature -> rule -> expected tokens, one list per question."""
    from vllm import SamplingParams

    width = {"width": args.width} if shape in ("rsd_s", "spectr") else {}
    if shape == "rsd_c":
        width["branching"] = args.branching
    llm = engine(args, {
        "method": "draft_tree", "model": args.draft, "num_speculative_tokens": args.nodes,
        "control": {"policy": "fixed"}, "shape": shape, **width,
    })  # fmt: skip

    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    hook = Replay(runner, chosen(args)[shape])
    end = llm.get_tokenizer().eos_token_id
    results = {}
    for temperature, written in texts.items():
        # Steps near a request's last token draft less: the places stop before. Seeds give all
        # shapes the same noise, which steadies their differences.
        hook.texts = {tuple(prompt): [*output, end] for prompt, output in written}
        hook.tokens = {}
        llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in written],
            [
                SamplingParams(
                    temperature=float(temperature),
                    top_p=args.top_p,
                    seed=seed,
                    max_tokens=args.max_tokens + args.nodes + 2,
                )
                for seed in range(args.seed, args.seed + len(written))
            ],
            use_tqdm=False,
        )
        results[temperature] = {
            label: [of.get(tuple(prompt), []) for prompt, _ in written]
            for label, of in hook.tokens.items()
        }
    return results


def summary(results: dict[str, list[list[tuple[float, int]]]]) -> dict[str, dict[str, float]]:
    """Of every "shape, rule": the mean over all places, expected and judged, and the difference
    of the expected one over each base, with 95 % intervals.

    A ratio estimator over questions: places of one question are not independent.
    """
    places = {label: np.array([len(of) for of in each]) for label, each in results.items()}
    (counts, *others) = places.values()
    if any((other != counts).any() for other in others):
        raise RuntimeError(f"the shapes did not see the same places: {places}")
    # [label] -> float [questions, 2]
    sums = {
        label: np.array([np.sum(of, axis=0) if of else (0.0, 0.0) for of in each])
        for label, each in results.items()
    }

    def mean(values: np.ndarray) -> tuple[float, float]:
        found = values.sum() / counts.sum()
        spread = (values - found * counts).std(ddof=1) * np.sqrt(len(counts)) / counts.sum()
        return float(found), float(1.96 * spread)

    out = {}
    for label, of in sums.items():
        row = out[label] = {"places": int(counts.sum())}
        row["tokens"], row["tokens ci"] = mean(of[:, 0])
        row["judged"] = mean(of[:, 1])[0]
        row["judged over expected ci"] = mean(of[:, 1] - of[:, 0])[1]
        for base in BASES:
            if base not in sums:
                continue
            row[f"over {base}"], row[f"over {base} ci"] = mean(of[:, 0] - sums[base][:, 0])
    return out


def child(shape: str | None, folder: str, jobs: int = 1) -> None:
    """Measure a shape, or write the texts, in a process of its own; one of ``jobs``."""
    shared = {}
    if jobs > 1:
        cores = str((os.cpu_count() or 1) // jobs)
        shared = {"OMP_NUM_THREADS": cores, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, *sys.argv, "--child", json.dumps([shape, folder])]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | shared)
    print(f"measured: {shape or 'texts'}", flush=True)


def main() -> None:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--branching", type=int, nargs="+", help="of rsd_c: width, 1, 1, ...")
    parser.add_argument(
        "--questions", type=int, nargs="+", default=[60, 90, 200], help="for each temperature"
    )
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6, 1.0])
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--rules", nargs="+", help='"shape, rule"; by default all')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="engines beside each other")
    args = parser.parse_args()
    args.branching = args.branching or [args.width] + [1] * (args.nodes // args.width - 1)
    if args.child:
        shape, folder = json.loads(args.child)
        texts = Path(folder, "texts.json")
        if shape is None:
            texts.write_text(json.dumps(write(args)))
        else:
            found = replay(args, shape, json.loads(texts.read_text()))
            Path(folder, f"{shape}.json").write_text(json.dumps(found))
        return
    results: dict[str, dict] = {str(t): {} for t in args.temperatures}
    with tempfile.TemporaryDirectory() as folder:
        child(None, folder)
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda shape: child(shape, folder, args.jobs), chosen(args)))
        for shape in chosen(args):
            for temperature, rules in json.loads(Path(folder, f"{shape}.json").read_text()).items():
                for rule, each in rules.items():
                    results[temperature][f"{shape}, {rule}"] = each
    found = {temperature: summary(each) for temperature, each in results.items()}
    for temperature, rows in found.items():
        print(f"\ntemperature {temperature}, {args.nodes} nodes")
        for label, row in rows.items():
            print(
                f"  {label:22} {row['tokens']:.3f} ±{row['tokens ci']:.3f}"
                f"   judged {row['judged']:.3f} ±{row['judged over expected ci']:.3f}"
                f"   ({row['places']} places)"
            )
            for base in BASES:
                if base != label and f"over {base}" in row:
                    gain, half = row[f"over {base}"], row[f"over {base} ci"]
                    print(f"    over {base:22} {gain:+.4f} ±{half:.4f}")
    if args.out:
        from vllm_specplus.compat import vllm_version

        setting = {
            "command": " ".join(sys.argv), "vllm": vllm_version(),
            "machine": platform.machine(), "cores": os.cpu_count(),
            "nodes": args.nodes, "width": args.width, "branching": args.branching,
            "questions": args.questions, "max_tokens": args.max_tokens,
            "top_p": args.top_p,
            "seed": args.seed,
        }  # fmt: skip
        means = {
            temperature: {
                label: [[len(of), *np.sum(of or [(0.0, 0)], axis=0).round(4)] for of in each]
                for label, each in shapes.items()
            }
            for temperature, shapes in results.items()
        }
        document = {"setting": setting, "summary": found, "places, expected, judged": means}
        Path(args.out).write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
