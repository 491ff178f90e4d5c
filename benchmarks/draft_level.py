"""What a level of a draft model costs beside its matrix products, and what it takes beside a text.

    python benchmarks/draft_level.py [--draft DIR] [--head-tokens N] [--threads N] [--json OUT]

A level: one forward pass over the nodes that some requests add to their trees, to float32 logits.
Its matrix products: those of its projections, MLPs and output layer alone, of the same weights and
rows, by ``torch.nn.functional.linear``. Both in turns; microseconds, the median of many, and of the
ratios within turns.

Bytes are those of all tensors that a level makes, and of the largest of them, behind texts of
different lengths. The C++ kernel's scratch is not among them: per thread, 96 bytes per token of the
longest text, whatever the layers and requests.
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
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_specplus.bench.report import describe_run
from vllm_specplus.drafting.executor import DraftExecutor
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.kernels.native import cache_dir

#: (requests, nodes that each adds).
LEVELS = ((1, 1), (1, 3), (1, 8), (4, 3), (16, 3))
CONTEXTS = (128, 1024)
LONG = (128, 1024, 4096, 8000)
MAX_NODES, ROUNDS = 64, 40


class Made(TorchDispatchMode):
    """Adds up the bytes of the tensors that are made, and remembers the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and not each._is_view():
                size = each.numel() * each.element_size()
                self.total, self.largest = self.total + size, max(self.largest, size)
        return out


class Levels:
    """Second levels of trees behind random texts, again and again."""

    def __init__(self, model: DraftModel, requests: int, width: int, context: int):
        self.run = DraftExecutor(model, requests * (context + 2 * MAX_NODES), MAX_NODES)
        rng = np.random.default_rng(0)
        self.names = [f"r{i}" for i in range(requests)]
        self.texts = list(rng.integers(0, model.vocab_size, (requests, context)).astype(np.int32))
        assert all(self.run.room(name, context) for name in self.names)
        self.active = torch.arange(requests)
        self.tokens = torch.from_numpy(rng.integers(0, model.vocab_size, (requests, width)))
        self.root = torch.full((requests, width), -1)
        self.parents = torch.arange(width).expand(requests, -1)
        self.begin()

    def begin(self) -> None:
        """A new round."""
        self.run.begin(self.names, self.texts, [0] * len(self.names))
        self.run.grow(self.active, self.tokens, self.root)

    def __call__(self) -> None:
        self.run.trees.nodes = self.tokens.shape[1]  # the same level again
        self.run.grow(self.active, self.tokens, self.parents)


def weights_of(model: DraftModel) -> list[torch.Tensor]:
    """Of all matrix products of a level."""
    weights = [
        module.weight
        for layer in model.layers
        for part in (layer.attention, layer.mlp)
        for module in part.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    return [*weights, model._head]


def products(weights: list[torch.Tensor], rows: int):
    """The matrix products alone of so many rows."""
    inputs = [torch.randn(rows, w.shape[1]).to(w.dtype) for w in weights]

    @torch.inference_mode()
    def run() -> None:
        for rows, weight in zip(inputs, weights, strict=True):
            linear(rows, weight)

    return run


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cost(
    model: DraftModel, weights: list[torch.Tensor], requests: int, width: int, context: int
) -> dict[str, float]:
    """Microseconds of a level and of its products, and the ratio."""
    level, alone = Levels(model, requests, width, context), products(weights, requests * width)
    for call in (level, alone):
        call()
    times = np.array([(seconds(level), seconds(alone)) for _ in range(ROUNDS)])
    return {
        "level_us": 1e6 * statistics.median(times[:, 0]),
        "products_us": 1e6 * statistics.median(times[:, 1]),
        "ratio": statistics.median(times[:, 0] / times[:, 1]),
    }


def bytes_made(model: DraftModel, context: int) -> dict[str, int]:
    """Of a level of three nodes."""
    level = Levels(model, 1, 3, context)
    with Made() as made:
        level()
    return {"bytes": made.total, "largest_bytes": made.largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draft", default=str(next(cache_dir().glob("smollm2-*-draft-*"))))
    parser.add_argument("--head-tokens", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = DraftModel(args.draft, torch.device("cpu"), torch.bfloat16, args.head_tokens)
    weights = weights_of(model)  # while they are of modules
    model.quicken()
    levels = []
    for requests, width in LEVELS:
        for context in CONTEXTS:
            entry = {"requests": requests, "width": width, "context": context}
            entry |= cost(model, weights, requests, width, context)
            levels.append(entry)
            print(*(f"{v:.2f}" if isinstance(v, float) else v for v in entry.values()), flush=True)
    made = [{"context": context} | bytes_made(model, context) for context in LONG]
    print(*made, sep="\n")
    if args.json:
        with tempfile.TemporaryDirectory() as folder:
            report = describe_run(Path(folder, "machine.log"))
        report |= {"threads": args.threads, "head_tokens": args.head_tokens}
        report |= {"draft": Path(args.draft).name, "levels": levels, "temporary": made}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
