"""What a step of ours costs, by counts: launches, copies, bytes and calls, at any length of text.

    python benchmarks/step_counts.py --commit REV --out benchmarks/results/step_counts.json

No model and no engine: the parts of a step that are ours run on made-up batches of 1 and 64
requests whose texts have 1k, 32k and 128k tokens, with the code of a commit before (checked out
beside this one) and with this one's. Counted in one step, after some that warm up:

- ``launches``: operations of torch that compute something; each is a kernel on a GPU;
- ``copies``: from the host to the device and back, as they would be on a GPU, and their ``bytes``;
- ``calls``: of and by Python functions of this package;
- ``allocated``: most bytes that Python and NumPy held for the step at one time.

Counts do not say what compiled loops read: ``us`` is the median time of a step, on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_specplus import registry
from vllm_specplus.compat import vllm_version
from vllm_specplus.config import parse
from vllm_specplus.drafting.cache import PagedCache
from vllm_specplus.engine import uploads
from vllm_specplus.engine.batch import BatchView, describe, logits_rows
from vllm_specplus.engine.tree_metadata import StepTrees
from vllm_specplus.engine.verify import TargetDraws, Verifier, VerifyBatch
from vllm_specplus.proposer import Services
from vllm_specplus.step import Rows, StepContext, prior_tables
from vllm_specplus.tree import DraftTokens, row_depths

ROOT = Path(__file__).resolve().parents[1]
REQUESTS, LENGTHS = (1, 64), (1024, 32 * 1024, 128 * 1024)
VOCAB, PROMPT = 1000, 512
#: Most probable ids per row that a proposer reads.
TOP_K = 8
#: Nodes below every root: two children, one of which has one.
PARENTS = np.array([-1, 0, 0, 1], np.int32)
#: Tokens that every text gains per step.
GAIN = 2
WARM_UP, TIMED = 3, 5
COUNTS = ("launches", "copies", "bytes", "calls", "allocated", "us")
CPU = torch.device("cpu")

#: Runs a step: its number is given.
Step = Callable[[int], object]


# -- parts of a step ----------------------------------------------------------------


class Batch:
    """Texts of some requests, which gain tokens with every step."""

    def __init__(self, requests: int, length: int):
        self.requests, self.length = requests, length
        self.names = [f"request {r}" for r in range(requests)]
        width = length + GAIN * (WARM_UP + TIMED + 4)
        rng = np.random.default_rng(0)
        # Some tokens are frequent, as in texts.
        self.tokens = (rng.zipf(1.3, (requests, width)) % VOCAB).astype(np.int32)
        self.parents = np.tile(PARENTS, requests)
        self.starts = np.arange(requests + 1, dtype=np.int32) * len(PARENTS)
        self.drafted = rng.integers(0, VOCAB, len(self.parents)).astype(np.int32)

    def known(self, step: int) -> np.ndarray:
        return np.full(self.requests, self.length + GAIN * step, np.int32)

    def rows(self) -> Rows:
        depths = row_depths(self.parents, self.starts)
        return Rows(self.drafted, self.parents, self.starts, depths)


def of_this_commit(kind: type, values: dict) -> object:
    """An instance of a dataclass that an earlier commit may know fewer fields of."""
    known = {each.name for each in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in known})


def drafting(method: str) -> Callable[[Batch], Step]:
    def make(batch: Batch) -> Step:
        services = Services(vocab_size=VOCAB, fingerprint="", report=_fail, count=lambda *_: None)
        proposer = registry.method_class(method)(parse({"method": method}), services)
        none = np.empty(0, np.int32)
        every = np.full(batch.requests, 8, np.int32)

        def step(number: int) -> object:
            from vllm_specplus.step import Observation

            context = of_this_commit(
                StepContext,
                {
                    "request_ids": batch.names, "token_ids": batch.tokens,
                    "num_tokens": batch.known(number), "max_nodes": every.copy(),
                    "chain_only": np.zeros(batch.requests, bool),
                    "observation": Observation(
                        none, none, np.empty((0, proposer.top_k), np.int32), none > 0
                    ),
                    "num_prompt_tokens": np.full(batch.requests, PROMPT, np.int32),
                    "acceptance": prior_tables(proposer.sources, batch.requests),
                    "row_starts": np.zeros(batch.requests + 1, np.int32),
                    "versions": np.zeros(batch.requests, np.int64),
                },
            )  # fmt: skip
            return proposer.propose(context)

        return step

    return make


def draft_cache(batch: Batch) -> Step:
    """Which tokens a draft model has to read, and where their keys and values go."""
    pages = batch.requests * (batch.tokens.shape[1] // 16 + 2)
    cache = PagedCache([0], 1, 1, pages, torch.float32, CPU)
    version = (0,) if PagedCache.cached.__code__.co_argcount > 3 else ()

    def step(number: int) -> object:
        length = int(batch.known(number)[0])
        done = []
        for name, text in zip(batch.names, batch.tokens, strict=True):
            cache.reserve(name, length)
            done.append(cache.cached(name, text[:length], *version))
            cache.remember(name, text[:length], *version)
        return done, cache.table(batch.names)

    return step


def sampling(seeded: bool, penalised: bool) -> Callable[[Batch], Step]:
    def make(batch: Batch) -> Step:
        count, rows = batch.requests, batch.rows()
        logits = torch.randn(len(batch.parents), VOCAB)
        prompts = torch.from_numpy(batch.tokens[:, :PROMPT].astype(np.int64))
        outputs = [row[PROMPT : batch.length].tolist() for row in batch.tokens]
        penalty = torch.full((count,), 0.5 * penalised)
        metadata = SamplingMetadata(
            temperature=torch.ones(count), all_greedy=False, all_random=True, top_p=None,
            top_k=None, max_num_logprobs=None, no_penalties=not penalised,
            generators={r: torch.Generator().manual_seed(r) for r in range(count) if seeded},
            prompt_token_ids=prompts if penalised else None, frequency_penalties=penalty,
            presence_penalties=penalty, repetition_penalties=penalty + 1,
            output_token_ids=outputs if penalised else [], allowed_token_ids_mask=None,
            bad_words_token_ids={}, logitsprocs=LogitsProcessors(),
        )  # fmt: skip
        verifier = Verifier(TargetDraws(Sampler()), None, TOP_K, False)

        def step(number: int) -> object:
            known = batch.known(number)
            for row, output in zip(batch.tokens, outputs, strict=True):
                output += row[PROMPT + len(output) : known[0]].tolist()
            values = {
                "request_ids": batch.names, "rows": rows, "metadata": metadata,
                "temperature": np.ones(count, np.float32),
                "top_k": np.full(count, VOCAB, np.int32), "top_p": np.ones(count, np.float32),
                "discarded": np.zeros(count, bool), "relaxed_stops": [None] * count,
            } | _texts(batch, known, penalised)  # fmt: skip
            return verifier.verify(logits.clone(), of_this_commit(VerifyBatch, values))

        return step

    return make


def _texts(batch: Batch, known: np.ndarray, penalised: bool) -> dict:
    try:
        from vllm_specplus.engine.row_penalties import Texts
    except ImportError:  # a commit before
        return {}
    count = batch.requests
    return {
        "texts": Texts(
            batch.names, batch.tokens, known, np.full(count, PROMPT, np.int32),
            np.zeros(count, np.int64), np.full(count, penalised),
        )
    }  # fmt: skip


def inputs(batch: Batch) -> Step:
    """A step of trees, described and sent to the device."""
    drafts = [DraftTokens(batch.drafted[: len(PARENTS) - 1].tolist(), PARENTS[1:] - 1)]
    counts = np.full(batch.requests, len(PARENTS), np.int32)

    def step(number: int) -> object:
        view = BatchView(
            batch.names, drafts * batch.requests, counts, batch.known(number), batch.tokens,
            np.tile(batch.drafted[: len(PARENTS)], batch.requests),
        )  # fmt: skip
        at = logits_rows(counts - 1, np.cumsum(counts))
        described = describe(view, at, False)
        if hasattr(StepTrees, "send"):
            return StepTrees.send(described, _upload, "cuda")
        # A commit before.
        return StepTrees.of(described, _upload, "cuda"), _upload({"array": at})

    return step


def _upload(arrays):
    return uploads.upload(arrays, CPU)


def _fail(error: Exception) -> None:
    raise error


PARTS: dict[str, Callable[[Batch], Step]] = {
    "draft: token_recycling": drafting("token_recycling"),
    "draft: cache of a draft model": draft_cache,
    "inputs of a tree step": inputs,
    "verify, sampled": sampling(seeded=False, penalised=False),
    "verify, penalties": sampling(seeded=False, penalised=True),
    "verify, seeded": sampling(seeded=True, penalised=False),
}


# -- counting -------------------------------------------------------------------------

#: Operations that compute nothing.
VIEWS = {
    "view", "_unsafe_view", "expand", "slice", "select", "unsqueeze", "squeeze", "t", "transpose",
    "permute", "as_strided", "alias", "detach", "empty", "empty_strided", "split", "unbind",
    "_reshape_alias", "lift_fresh", "_local_scalar_dense",
}  # fmt: skip


class Launches(TorchDispatchMode):
    def __init__(self, into: Counter):
        super().__init__()
        self._into = into

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in VIEWS:
            self._into["launches"] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def replaced(owner: object, name: str, make: Callable) -> Iterator[None]:
    stock = getattr(owner, name)
    setattr(owner, name, make(stock))
    try:
        yield
    finally:
        setattr(owner, name, stock)


@contextlib.contextmanager
def copies(into: Counter) -> Iterator[None]:
    """Counts what would travel between host and device."""
    inside = False

    def sends(stock):
        def send(*args, **kwargs):
            out = stock(*args, **kwargs)
            if not inside:
                into["copies"] += 1
                into["bytes"] += out.nbytes
            return out

        return send

    def packs(stock):
        def upload(arrays, device):
            nonlocal inside
            into["copies"] += 1
            into["bytes"] += sum(each.nbytes for each in arrays.values())
            inside = True
            try:
                return stock(arrays, device)
            finally:
                inside = False

        return upload

    def fetches(stock):
        def fetch(tensor, *args, **kwargs):
            if not inside:
                into["copies"] += 1
                into["bytes"] += tensor.nbytes
            return stock(tensor, *args, **kwargs)

        return fetch

    def packs_back(stock):
        def to_host(*tensors):
            nonlocal inside
            # From a GPU they travel as one, which takes a launch to lay them side by side.
            into["copies"] += 1
            into["launches"] += 1
            into["bytes"] += sum(each.nbytes for each in tensors)
            inside = True
            try:
                return stock(*tensors)
            finally:
                inside = False

        return to_host

    with contextlib.ExitStack() as stack:
        for name in ("from_numpy", "tensor", "as_tensor"):
            stack.enter_context(replaced(torch, name, sends))
        for name in ("cpu", "item", "tolist"):
            stack.enter_context(replaced(torch.Tensor, name, fetches))
        for name, module in list(sys.modules.items()):
            if not name.startswith("vllm_specplus.engine"):
                continue
            for function, make in (("upload", packs), ("to_host", packs_back)):
                if hasattr(module, function):
                    stack.enter_context(replaced(module, function, make))
        yield


@contextlib.contextmanager
def calls(into: Counter) -> Iterator[None]:
    package = f"{os.sep}vllm_specplus{os.sep}"

    def profile(frame, event, _):
        if event in ("call", "c_call") and package in frame.f_code.co_filename:
            into["calls"] += 1

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def measure(part: str, requests: int, length: int) -> dict[str, float]:
    """``COUNTS`` of one step."""
    step = PARTS[part](Batch(requests, length))
    for number in range(WARM_UP):
        step(number)
    into: Counter = Counter()
    with copies(into), Launches(into):
        step(WARM_UP)
    with calls(into):
        step(WARM_UP + 1)
    gc.collect()
    tracemalloc.start()
    step(WARM_UP + 2)
    into["allocated"] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    times = []
    for number in range(WARM_UP + 3, WARM_UP + 3 + TIMED):
        start = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - start)
    into["us"] = round(1e6 * float(np.median(times)))
    return {name: into[name] for name in COUNTS}


def measure_all() -> dict[str, dict[str, dict[str, float]]]:
    """Part -> "requests x length" -> counts."""
    measured: dict = {part: {} for part in PARTS}
    for part, cases in measured.items():
        for requests in REQUESTS:
            for length in LENGTHS:
                case = f"{requests} x {length // 1024}k"
                print(part, case, file=sys.stderr, flush=True)
                cases[case] = measure(part, requests, length)
    return measured


# -- report -----------------------------------------------------------------------------


def table(document: dict) -> str:
    """Markdown: every part, before -> now where they differ."""
    lines = [
        "| part of a step | requests x tokens | " + " | ".join(COUNTS) + " |",
        "|---|---|" + "---|" * len(COUNTS),
    ]
    for part, cases in document["now"].items():
        for case, now in cases.items():
            before = document["before"][part][case]
            cells = [_cell(before[name], now[name]) for name in COUNTS]
            lines.append(f"| {part} | {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(before: float, now: float) -> str:
    return f"{now:,}" if before == now else f"{before:,} → {now:,}"


def at_commit(revision: str) -> tuple[str, dict]:
    """(short name, counts) of an earlier commit, measured by this file."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run(
        [*git, "rev-parse", "--short", revision], check=True, capture_output=True, text=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "before"
        subprocess.run([*git, "worktree", "add", "--detach", str(checkout), revision], check=True)
        try:
            out = subprocess.run(
                [sys.executable, __file__, "--measure"], check=True, stdout=subprocess.PIPE,
                text=True, env=os.environ | {"PYTHONPATH": str(checkout)}, cwd=folder,
            ).stdout  # fmt: skip
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(checkout)], check=True)
    return name, json.loads(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--commit", help="compare with the code of this commit")
    parser.add_argument("--out")
    parser.add_argument("--measure", action="store_true", help="print counts as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        print(json.dumps(measure_all()))
        return
    now = measure_all()
    before, counts = at_commit(args.commit) if args.commit else ("", now)
    setting = {
        "vllm": vllm_version(), "torch": torch.__version__, "machine": platform.machine(),
        "cores": os.cpu_count(), "before": before, "vocabulary": VOCAB, "rows": len(PARENTS),
        "command": f"python benchmarks/step_counts.py --commit {before}",
    }  # fmt: skip
    document = {"setting": setting, "before": counts, "now": now}
    if args.out:
        Path(args.out).write_text(json.dumps(document, indent=1) + "\n")
    print(table(document))


if __name__ == "__main__":
    main()
