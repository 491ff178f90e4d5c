"""What a row costs in the C++ tree attention, and in vLLM's own CPU kernel beside it.

    python benchmarks/tree_attention_cpu.py [--json OUT]

One layer of attention on this machine's cores: some requests with the same context, of which each
verifies so many rows. Ours gets them as trees (a comb), vLLM's as a chain, which is what it serves.
Microseconds per call, the median of many.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from vllm import _custom_ops as ops

from vllm_specplus.bench.report import describe_run
from vllm_specplus.engine.attention.cpu import cache_layout
from vllm_specplus.kernels import native

#: (query heads, KV heads, head size): SmolLM2-135M, Llama-3.2-1B, Llama-3.1-8B.
MODELS = {"smollm2-135m": (9, 3, 64), "llama-1b": (32, 8, 64), "llama-8b": (32, 8, 128)}
BATCHES = ((1, 1), (1, 8), (1, 32), (8, 1), (8, 4), (32, 1), (32, 4))
CONTEXTS = (128, 1024)
BLOCK = 128  # as vLLM has them on CPUs
ROUNDS = 30


def isa_of(dtype: torch.dtype, head_size: int) -> str:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return _get_attn_isa(dtype, BLOCK, head_size)


def timed(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median microseconds."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


class Case:
    def __init__(self, model: str, dtype: torch.dtype, requests: int, rows: int, context: int):
        self.heads, self.kv_heads, self.size = MODELS[model]
        self.requests, self.rows, self.context, self.dtype = requests, rows, context, dtype
        self.isa = isa_of(dtype, self.size)
        blocks = -(-(context + rows) // BLOCK)
        torch.manual_seed(0)
        self.cache = torch.randn(requests * blocks, self.kv_heads, BLOCK, 2 * self.size).to(dtype)
        order = torch.randperm(requests * blocks).to(torch.int32)
        self.table = order.view(requests, blocks).contiguous()
        self.query = torch.randn(requests * rows, self.heads, self.size).to(dtype)
        self.out = torch.empty_like(self.query)
        self.starts = torch.arange(requests + 1, dtype=torch.int32) * rows
        self.lengths = torch.full((requests,), context + rows, dtype=torch.int32)

    def ours(self) -> float:
        size, width = self.size, self.heads * self.size
        # A comb: every second row is a leaf beside the path.
        parents = torch.tensor([max(i - 1 - i % 2, -1) if i else -1 for i in range(self.rows)])
        parents = parents.to(torch.int32).repeat(self.requests)
        rows = torch.arange(self.requests * self.rows)
        context = torch.full((self.requests,), self.context, dtype=torch.int32)
        layout = cache_layout(self.isa, self.dtype, BLOCK, size)
        batch = native.TreeBatch(
            num_requests=self.requests, num_query_heads=self.heads, num_kv_heads=self.kv_heads,
            head_size=size, value_size=size, block_size=BLOCK, layout=native.LAYOUTS[layout],
            dtype=native.DTYPES[self.dtype], cache_dtype=native.DTYPES[self.dtype],
            value_scale=1.0, max_blocks=self.table.stride(0), scale=size**-0.5,
            page_stride=self.cache.stride(0), head_stride=self.cache.stride(1),
            query_stride=width, output_stride=width, rows=rows.data_ptr(),
            row_start=self.starts.data_ptr(), context=context.data_ptr(),
            block_table=self.table.data_ptr(), parents=parents.data_ptr(), first=None,
        )  # fmt: skip
        attend = native.library().specplus_tree_attention
        pointers = (self.query.data_ptr(), self.cache.data_ptr(), self.out.data_ptr())
        return timed(lambda: attend(ctypes.byref(batch), *pointers))

    def vllms(self) -> float:
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=self.requests, num_heads=self.heads, num_kv_heads=self.kv_heads,
            head_dim=self.size, seq_lens=self.lengths, dtype=self.dtype,
            query_start_loc=self.starts, causal=True, sliding_window_size=-1, isa=self.isa,
            enable_kv_split=True,
        )  # fmt: skip
        keys, values = self.cache.view(*self.cache.shape[:2], 2 * BLOCK, self.size).chunk(2, 2)

        def call():
            ops.cpu_attention_with_kv_cache(
                query=self.query, key_cache=keys, value_cache=values, output=self.out,
                query_start_loc=self.starts, seq_lens=self.lengths, scale=self.size**-0.5,
                causal=True, alibi_slopes=None, sliding_window=-1, block_table=self.table,
                softcap=0.0, scheduler_metadata=metadata, s_aux=None,
            )  # fmt: skip

        return timed(call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table = []
    for model in MODELS:
        for dtype in (torch.bfloat16, torch.float32):
            for requests, rows in BATCHES:
                for context in CONTEXTS:
                    case = Case(model, dtype, requests, rows, context)
                    entry = {
                        "model": model, "dtype": str(dtype).removeprefix("torch."),
                        "requests": requests, "rows": rows, "context": context,
                        "ours_us": case.ours(), "vllm_us": case.vllms(),
                    }  # fmt: skip
                    table.append(entry)
                    print(
                        *(f"{v:.0f}" if isinstance(v, float) else v for v in entry.values()),
                        f"{entry['ours_us'] / entry['vllm_us']:.2f}", flush=True,
                    )  # fmt: skip
    if args.json:
        with tempfile.TemporaryDirectory() as folder:
            report = describe_run(Path(folder, "machine.log")) | {"cases": table}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
