"""Multi-head latent attention of trees: the reference against the one of plain attention, which is
against a loop, the C++ and Triton kernels against the reference."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import torch

from tests.kernels.tree_batch import CHAIN, DEVICE, ROOT, STAR, Batch, random_tree
from vllm_specplus.kernels import native
from vllm_specplus.kernels.reference import (
    latent_tree_attention_reference,
    tree_attention_reference,
)
from vllm_specplus.kernels.tree_attention import latent_group, latent_tree_attention

#: Error of an output, absolute and relative: what rounds it is of 16 bits.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

TREES = {
    "roots": ([ROOT, ROOT], [0, 40]),
    "trees about pages": ([CHAIN, STAR, random_tree(9, 1)], [15, 16, 17]),
    "one long context": ([random_tree(33, 2), CHAIN], [300, 3]),
}


def batch_of(name: str, heads: int, size: int, dtype: torch.dtype) -> Batch:
    """Trees over one KV head, whose keys and values of ``size`` elements in all are the latents."""
    return Batch(*TREES[name], num_kv_heads=1, group=heads, head_size=size // 2, dtype=dtype)


def latents_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [T, H, D] and latents [pages, block_size, D]."""
    latents = batch.kv_cache[:, 0].contiguous()
    generator = torch.Generator().manual_seed(1)
    rows, heads, _ = batch.arguments[0].shape
    query = torch.randn(rows, heads, latents.shape[-1], generator=generator)
    return query.to(latents), latents


def expected(query: torch.Tensor, latents: torch.Tensor, batch: Batch, rank: int) -> torch.Tensor:
    """By the reference of plain attention in float32, with what is no value set to 0."""
    values = latents.clone()
    values[..., rank:] = 0
    output, _ = tree_attention_reference(
        query.float(), latents[:, :, None].float(), values[:, :, None].float(),
        *batch.arguments[3:], part="all",
    )  # fmt: skip
    return output[..., :rank].to(query.dtype)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def fields_of(batch: Batch, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    _, _, _, starts, contexts, table, ancestors, _ = batch.arguments
    return {
        "rows": rows, "query_start_loc": starts, "context_lens": contexts, "block_table": table,
        "ancestors": ancestors,
    }  # fmt: skip


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_reference_is_attention_over_rows_that_heads_share(name, dtype):
    batch = batch_of(name, 4, 96, dtype)
    query, latents = (each.cpu() for each in latents_of(batch))
    rows = torch.arange(len(query)).flip(0)
    output = query.new_full((len(query), 4, 64), 7.0)
    fields = {key: each.cpu() for key, each in fields_of(batch, rows).items()}
    latent_tree_attention_reference(query.flip(0), latents, output, **fields, scale=batch.scale)
    close(output.flip(0), expected(*latents_of(batch), batch, 64).cpu())


@pytest.mark.skipif(native.library() is None, reason="the C++ kernels cannot be built here")
@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "size", "rank"), [(1, 48, 32), (5, 576, 512), (16, 320, 256)])
def test_cpp(name, dtype, heads, size, rank):
    batch = batch_of(name, heads, size, dtype)
    query, latents = (each.cpu() for each in latents_of(batch))
    # Rows of other requests lie between; they are not touched.
    rows = torch.arange(len(query)) * 2 + 1
    spread = query.new_zeros(2 * len(query) + 1, heads, size)
    spread[rows] = query
    output = query.new_full((len(spread), heads, rank), 7.0)
    wanted = output.clone()
    fields = {key: each.cpu() for key, each in fields_of(batch, rows).items()}
    latent_tree_attention_reference(spread, latents, wanted, **fields, scale=batch.scale)
    parents = torch.tensor([*itertools.chain(*batch.trees)], dtype=torch.int32)
    code = native.DTYPES[dtype]
    described = native.TreeBatch(
        num_requests=len(batch.trees), num_query_heads=heads, num_kv_heads=1, head_size=size,
        value_size=rank, block_size=16, layout=native.LATENT, dtype=code, cache_dtype=code,
        max_blocks=fields["block_table"].stride(0), scale=batch.scale, value_scale=1.0,
        page_stride=latents.stride(0), query_stride=spread.stride(0),
        output_stride=output.stride(0), rows=rows.data_ptr(),
        row_start=fields["query_start_loc"].data_ptr(), context=fields["context_lens"].data_ptr(),
        block_table=fields["block_table"].data_ptr(), parents=parents.data_ptr(),
    )  # fmt: skip
    assert native.unsupported(described) is None
    native.library().specplus_tree_attention(
        ctypes.byref(described), spread.data_ptr(), latents.data_ptr(), output.data_ptr()
    )
    close(output, wanted)


@pytest.mark.skipif(native.library() is None, reason="the C++ kernels cannot be built here")
@pytest.mark.parametrize(
    ("sizes", "reason"),
    [((576, 512, 8), "block size"), ((72, 64, 16), "sizes of latents"), ((80, 72, 16), "latents")],
)
def test_cpp_says_what_it_cannot(sizes, reason):
    size, rank, block = sizes
    batch = native.TreeBatch(
        head_size=size, value_size=rank, block_size=block, layout=native.LATENT
    )
    assert reason in native.unsupported(batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "splits"), [(1, 1), (6, 1), (32, 2)])
def test_triton(name, dtype, heads, splits):
    """32 heads are two groups, which read the same rows."""
    batch = batch_of(name, heads, 96, dtype)
    query, latents = latents_of(batch)
    output = latent_tree_attention(
        query, latents, *batch.arguments[3:7], batch.scale, 64, max_rows=batch.max_rows,
        max_context_len=max(batch.contexts), num_splits=splits,
    )  # fmt: skip
    assert output.device.type == DEVICE
    close(output, expected(query, latents, batch, 64))


def test_heads_are_divided_evenly():
    groups = [latent_group(heads) for heads in (1, 2, 6, 16, 20, 40, 64, 128)]
    assert groups == [1, 2, 2, 16, 4, 8, 16, 16]


def test_another_tree_attends_otherwise():
    """The control of the comparisons above."""
    batch = batch_of("trees about pages", 4, 96, torch.float32)
    query, latents = latents_of(batch)
    right = expected(query, latents, batch, 64)
    batch.arguments[6][1:, 0] = False  # nobody but the first sees the root of the first request
    wrong = expected(query, latents, batch, 64)
    assert np.abs((right - wrong).cpu().numpy()).max() > 0.01
