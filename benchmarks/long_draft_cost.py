"""What a step of a long draft takes and holds, by the length of the context.

    python benchmarks/long_draft_cost.py [--size smollm2] [--device cpu] [--threads N] [--json OUT]

A draft of random weights in bfloat16, with the sizes of a target; the target's pages are filled at
random. A step: three tokens more of one request's text, and a tree of the paper's widths, level by
level, to float32 logits and the tokens that are chosen. Milliseconds, the median of some.

Bytes: what the draft holds for one request, and the largest tensor that a step makes; beside them
what the keys and values of the text would take that a draft without a window has to hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_specplus.bench.report import describe_run
from vllm_specplus.drafting.cache import PAGE, PageStore
from vllm_specplus.drafting.context_pages import ContextPages, PackedPages, PlainPages
from vllm_specplus.drafting.long_checkpoint import LAST_NORM, NORMS, PROJECTIONS, WINDOW
from vllm_specplus.drafting.long_draft import LongDraft
from vllm_specplus.drafting.long_executor import LongExecutor
from vllm_specplus.drafting.shapes import Beams

CONTEXTS, TREE = (1024, 8192, 32768), (4, 16, 16, 16, 16)
#: Steps that are timed, those before that are not, and tokens that the text gains in each.
ROUNDS, UNTIMED, GAINED = 20, 3, 3
SIZES = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    },
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
}  # fmt: skip


class RandomVocabulary:
    """An embedding and an output layer of one random matrix."""

    def __init__(self, size: dict[str, int], device: torch.device):
        shape = size["vocab_size"], size["hidden_size"]
        self._rows = torch.randn(shape, device=device, dtype=torch.bfloat16)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._rows[tokens]

    def output(self, normed: torch.Tensor) -> torch.Tensor:
        return linear(normed, self._rows).float()


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and not each._is_view():
                self.bytes = max(self.bytes, each.numel() * each.element_size())
        return out


def random_draft(size: dict[str, int], device: torch.device) -> LongDraft:
    """A draft of these sizes."""
    hidden, inner, dim = size["hidden_size"], size["intermediate_size"], size["head_dim"]
    queries, keys = size["num_attention_heads"] * dim, size["num_key_value_heads"] * dim
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": inner, "up_proj": inner}
    columns = {"o_proj": queries, "down_proj": inner}
    tensors = {
        f"{part}.{name}.weight": 0.02
        * torch.randn(rows.get(name, hidden), columns.get(name, hidden), dtype=torch.bfloat16)
        for part, names in PROJECTIONS.items()
        for name in names
    }
    tensors |= {f"{name}.weight": torch.ones(hidden) for name in (*NORMS, LAST_NORM)}
    config = size | {"model_type": "llama", "max_position_embeddings": 1 << 17}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder, "model.safetensors"))
        Path(folder, "config.json").write_text(json.dumps(config))
        return LongDraft(folder, RandomVocabulary(size, device), device, torch.bfloat16)


def random_pages(draft: LongDraft, context: int) -> ContextPages:
    """The target's pages of one text of ``context`` tokens, in order."""
    pages = -(-context // PAGE)
    store = PageStore(
        [0], draft.kv_heads, draft.head_dim, pages, PAGE, draft.dtype, draft.device
    )  # fmt: skip
    for first in range(0, pages * PAGE, 4096):
        slots = torch.arange(first, min(first + 4096, pages * PAGE), device=draft.device)
        shape = (2, len(slots), draft.kv_heads, draft.head_dim)
        store.write(0, slots, *torch.randn(shape, dtype=draft.dtype, device=draft.device))
    if not store.packed:
        return PlainPages(*store.pages_of(0))
    packed = store.packed_pages(0)
    return PackedPages(packed.view(*packed.shape[:2], PAGE, -1), "vec", store.batch())


class Steps:
    """Steps behind one text that grows."""

    def __init__(self, draft: LongDraft, context: int):
        """``context``: tokens of the text after all of them."""
        nodes = sum(TREE)
        slots = (2 + -(-draft.window // PAGE) + 1 + -(-nodes // PAGE)) * PAGE
        self.run = LongExecutor(draft, slots, nodes)
        self.run.read_from(random_pages(draft, context))
        rng = np.random.default_rng(0)
        self.text = rng.integers(0, draft.config.vocab_size, context).astype(np.int32)
        self.pages = np.arange(-(-context // PAGE), dtype=np.int32)[None]
        self.length = context - GAINED * (ROUNDS + UNTIMED + 1)

    @torch.inference_mode()
    def __call__(self) -> None:
        self.length += GAINED
        assert self.run.room("r")
        logits = self.run.begin(["r"], [self.text[: self.length]], self.pages)[:, None]
        active = torch.zeros(1, dtype=torch.int64, device=logits.device)
        beams, before = Beams(TREE, active == 0), 0
        none = torch.empty(1, 0)
        for depth, width in enumerate(TREE):
            level = beams.expand(logits.softmax(-1), none)
            if depth + 1 == len(TREE):
                break
            parents = level.parents + (before - TREE[depth - 1] if depth else -1)
            logits = self.run.grow(active, level.tokens, parents)
            before += width
        beams.best(np.array([sum(TREE)]))  # on the host: the device has come to its end


def cost(draft: LongDraft, context: int) -> dict[str, float]:
    """Of a step behind ``context`` tokens."""
    steps = Steps(draft, context)
    for _ in range(UNTIMED):
        steps()
    with Largest() as made:
        steps()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        steps()
        times.append(time.perf_counter() - start)
    per_token = 2 * draft.kv_heads * draft.head_dim * draft.dtype.itemsize
    return {
        "context": context, "step_ms": 1e3 * statistics.median(times),
        "held_bytes": steps.run.held_bytes(), "largest_bytes": made.bytes,
        "without_window_bytes": context * per_token,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    draft = random_draft(SIZES[args.size], torch.device(args.device))
    contexts = []
    for context in CONTEXTS:
        contexts.append(cost(draft, context))
        print(*(f"{v:.2f}" if isinstance(v, float) else v for v in contexts[-1].values()),
              flush=True)  # fmt: skip
    if args.json:
        with tempfile.TemporaryDirectory() as folder:
            report = describe_run(Path(folder, "machine.log"))
        report |= {"size": args.size, "device": args.device, "threads": args.threads}
        report |= {"window": WINDOW, "tree": TREE, "contexts": contexts}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
