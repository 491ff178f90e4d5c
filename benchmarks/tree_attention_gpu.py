"""Checks and times tree attention on a GPU, at the attention shapes of Llama-3-8B.

For each batch of draft trees, three ways to attend to the same rows, K and V:

``causal``    FlashAttention with its causal mask, as stock vLLM verifies chains: the base line,
``flash``     the FLASH_ATTN tree path: context by FlashAttention, tree by Triton, merged,
``triton``    the TRITON_ATTN tree path: one Triton kernel for both.

The two tree paths, and the tree part alone, are first compared with the float32 reference; a wrong
result ends the run.
Times are medians over one layer's attention in microseconds, with cold caches
(``triton.testing.do_bench``). Usage:

    python benchmarks/tree_attention_gpu.py --output results.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
DTYPE = torch.bfloat16
SCALE = HEAD_SIZE**-0.5
#: Largest error allowed to a bfloat16 output, relative to the largest output.
TOLERANCE = 1e-2


def random_batch(batch_size: int, rows: int, context_len: int, seed: int = 0):
    """Random queries, K, V and trees, each node's parent being any earlier node.

    Returns the queries [T, H, D], the K and V caches and the tree batch.
    """
    from vllm_specplus.engine.attention.base import TreeAttentionMetadata
    from vllm_specplus.engine.attention.cuda import kv_views

    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(seed)
    total_rows = batch_size * rows
    blocks = -(-(context_len + rows) // BLOCK_SIZE)
    kv_cache = torch.randn(
        (batch_size * blocks, BLOCK_SIZE, NUM_KV_HEADS, 2 * HEAD_SIZE),
        generator=generator, device=device, dtype=DTYPE,
    ).transpose(1, 2)  # fmt: skip
    query = torch.randn(
        (total_rows, NUM_HEADS, HEAD_SIZE), generator=generator, device=device, dtype=DTYPE
    )
    block_table = torch.randperm(batch_size * blocks, generator=generator, device=device)

    parents = torch.full((batch_size, rows), -1)
    ancestors = torch.eye(rows, dtype=torch.bool).repeat(batch_size, 1, 1)
    cpu_generator = torch.Generator().manual_seed(seed)
    for request, row in itertools.product(range(batch_size), range(1, rows)):
        parent = int(torch.randint(row, (), generator=cpu_generator))
        parents[request, row] = parent
        ancestors[request, row] |= ancestors[request, parent]

    tree = TreeAttentionMetadata(
        rows=torch.arange(total_rows, device=device),
        query_start_loc=torch.arange(0, total_rows + 1, rows, dtype=torch.int32, device=device),
        context_lens=torch.full((batch_size,), context_len, dtype=torch.int32, device=device),
        block_table=block_table.view(batch_size, blocks).int(),
        parents=None,
        ancestors=ancestors.flatten(0, 1).to(device),
        max_rows=rows,
        max_context_len=context_len,
        other_rows=None,
        other=None,
    )
    return query, *kv_views(kv_cache), tree


def attention_paths(query, key_cache, value_cache, tree) -> dict[str, Callable[[], torch.Tensor]]:
    """The three ways to compute the attention of a batch, by name."""
    from vllm.v1.attention.backends import fa_utils

    from vllm_specplus.engine.attention.flash import flash_tree_attention
    from vllm_specplus.kernels.tree_attention import tree_attention

    fa_version = fa_utils.get_flash_attn_version(head_size=HEAD_SIZE)
    seq_lens = tree.context_lens + tree.max_rows
    max_seq_len = tree.max_context_len + tree.max_rows
    # vLLM computes FlashAttention 3's schedule once per step for all layers, so it is not timed.
    scheduler_metadata = None
    if fa_version == 3:
        scheduler_metadata = fa_utils.get_scheduler_metadata(
            batch_size=len(seq_lens),
            max_seqlen_q=tree.max_rows,
            max_seqlen_k=max_seq_len,
            num_heads_q=NUM_HEADS,
            num_heads_kv=NUM_KV_HEADS,
            headdim=HEAD_SIZE,
            cache_seqlens=seq_lens,
            qkv_dtype=DTYPE,
            cu_seqlens_q=tree.query_start_loc,
            page_size=BLOCK_SIZE,
            causal=True,
        )

    def causal() -> torch.Tensor:
        return fa_utils.flash_attn_varlen_func(
            q=query,
            k=key_cache,
            v=value_cache,
            cu_seqlens_q=tree.query_start_loc,
            max_seqlen_q=tree.max_rows,
            seqused_k=seq_lens,
            max_seqlen_k=max_seq_len,
            softmax_scale=SCALE,
            causal=True,
            block_table=tree.block_table,
            scheduler_metadata=scheduler_metadata,
            fa_version=fa_version,
        )

    def flash() -> torch.Tensor:
        return flash_tree_attention(query, key_cache, value_cache, tree, SCALE, fa_version)

    def triton() -> torch.Tensor:
        output, _ = tree_attention(
            query,
            key_cache,
            value_cache,
            tree.query_start_loc,
            tree.context_lens,
            tree.block_table,
            tree.ancestors,
            SCALE,
            part="all",
            max_rows=tree.max_rows,
            max_context_len=tree.max_context_len,
        )
        return output

    return {"causal": causal, "flash": flash, "triton": triton}


def largest_errors(query, key_cache, value_cache, tree, paths) -> dict[str, float]:
    """Largest error of each tree path and of the tree part, relative to the largest output.

    The tree part is checked alone too because it hardly weighs beside a long context.
    """
    from vllm_specplus.kernels.reference import tree_attention_reference
    from vllm_specplus.kernels.tree_attention import tree_attention

    arguments = (
        query,
        key_cache,
        value_cache,
        tree.query_start_loc,
        tree.context_lens,
        tree.block_table,
        tree.ancestors,
        SCALE,
    )

    def error(output: torch.Tensor, expected: torch.Tensor) -> float:
        return ((output.float() - expected).abs().max() / expected.abs().max()).item()

    whole, _ = tree_attention_reference(*arguments)
    errors = {name: error(paths[name](), whole) for name in ("flash", "triton")}
    tree_part, _ = tree_attention(*arguments, part="tree", max_rows=tree.max_rows)
    expected_tree_part, _ = tree_attention_reference(*arguments, part="tree")
    errors["tree_part"] = error(tree_part, expected_tree_part)
    return errors


def measure(batch_size: int, rows: int, context_len: int) -> dict:
    """One row of the results; ValueError if they are wrong."""
    from triton.testing import do_bench

    batch = random_batch(batch_size, rows, context_len)
    paths = attention_paths(*batch)
    errors = largest_errors(*batch, paths)
    # Not ``max() > TOLERANCE``, which NaN would pass.
    if not all(error <= TOLERANCE for error in errors.values()):
        raise ValueError(
            f"wrong results for batch size {batch_size}, {rows} rows, context {context_len}: "
            f"relative errors {errors} exceed {TOLERANCE}."
        )
    times = {name: 1000 * do_bench(path, return_mode="median") for name, path in paths.items()}
    return {
        "batch_size": batch_size,
        "rows": rows,
        "context_len": context_len,
        "microseconds": times,
        "ratio_to_causal": {name: times[name] / times["causal"] for name in ("flash", "triton")},
        "largest_error": errors,
    }


def environment() -> dict:
    """What the results depend on, beside the code."""
    from vllm import __version__ as vllm_version
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    return {
        "command": shlex.join(sys.argv),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": torch.cuda.get_device_capability(),
        "cuda": torch.version.cuda,
        "host": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "vllm": vllm_version,
        "flash_attention": get_flash_attn_version(head_size=HEAD_SIZE),
        "shape": {
            "query_heads": NUM_HEADS,
            "kv_heads": NUM_KV_HEADS,
            "head_size": HEAD_SIZE,
            "block_size": BLOCK_SIZE,
            "dtype": str(DTYPE),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--output", type=Path, help="JSON file to write the results to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tree_attention_gpu.py measures GPU kernels, and torch finds no CUDA GPU here.")

    results = []
    print("batch rows context  causal us   flash us (ratio)  triton us (ratio)")
    for shape in itertools.product(arguments.batch_sizes, arguments.rows, arguments.contexts):
        result = measure(*shape)
        results.append(result)
        times, ratios = result["microseconds"], result["ratio_to_causal"]
        print(
            f"{shape[0]:5} {shape[1]:4} {shape[2]:7}  {times['causal']:9.1f}  "
            f"{times['flash']:9.1f} ({ratios['flash']:5.2f})  "
            f"{times['triton']:9.1f} ({ratios['triton']:5.2f})",
            flush=True,
        )
    if arguments.output is not None:
        report = {"environment": environment(), "results": results}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
