"""The C++ kernels equal their torch references."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
import torch

from vllm_specplus.kernels import native
from vllm_specplus.kernels.reference import (
    move_slots_reference,
    packed_tree_attention_reference,
    page_offsets,
    top_k_reference,
)
from vllm_specplus.tree import ancestor_mask

PAGES = 24
AMX = pytest.param(
    "amx",
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not torch.cpu._is_amx_tile_supported(), reason="this processor has no AMX"
    ),
)
LAYOUTS = [("vec", torch.float32), ("vec", torch.bfloat16), ("vec", torch.float16), AMX]


def test_the_kernels_are_built():
    assert native.status() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [70, 1000, 4096])
def test_top_k(dtype, n):
    """bfloat16 rows of a few distinct values tie heavily: lower index first."""
    logits = torch.randn(5, 2 * n).mul(2).round().to(dtype)[:, :n]  # strided rows
    for k in (1, 3, 8, 16):
        ids, values = native.top_k(logits, k)
        expected_ids, expected_values = top_k_reference(logits, k)
        assert torch.equal(ids, expected_ids)
        assert torch.equal(values, expected_values)
    assert torch.equal(ids[:, 0].long(), logits.float().argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [16, 63, 64, 65, 200])
def test_top_k_of_ties(dtype, n):
    """Few distinct values, -inf (a masked token) most of all."""
    torch.manual_seed(n)
    logits = torch.randint(0, 3, (6, n)).to(dtype)
    logits[1:4][torch.rand(3, n) < 0.9] = float("-inf")
    logits[4], logits[5] = 0, float("-inf")
    for k in range(1, 17):
        ids, values = native.top_k(logits, k)
        expected_ids, expected_values = top_k_reference(logits, k)
        assert torch.equal(ids, expected_ids)
        assert torch.equal(values, expected_values)
    assert ids[5].tolist() == list(range(16))


def test_top_k_of_columns_that_are_not_contiguous():
    logits = torch.randn(100, 4).T
    assert torch.equal(native.top_k(logits, 8)[0], top_k_reference(logits, 8)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_top_k_tells_of_nan(dtype):
    """Of either sign, in a whole block of the kernel or behind the last; infinities are none."""
    clean = torch.full((6, 200), 1.0, dtype=dtype)
    clean[4, 100], clean[5, 100] = float("inf"), float("-inf")
    rows = clean.clone()
    nan = torch.tensor(float("nan"), dtype=dtype)
    rows[0, 0], rows[1, 77], rows[2, 199], rows[3, 63] = nan, -nan, nan, -nan
    for k in (1, 8):
        assert native.top_k(rows, k)[1][:, 0].isnan().tolist() == [True] * 4 + [False] * 2
        assert native.top_k(clean, k)[1][:, 0].tolist() == [1.0] * 4 + [float("inf"), 1.0]


@pytest.mark.parametrize(
    ("layout", "block", "head"),
    [("vec", 16, 80), ("vec", 128, 64), ("amx", 32, 64), ("amx", 128, 96)],
)
def test_page_offsets(layout, block, head):
    lib = native.library()
    k, v = page_offsets(layout, block, head)
    for value, table in enumerate((k, v)):
        at = [
            [
                lib.specplus_kv_offset(native.LAYOUTS[layout], value, block, head, token, dim)
                for dim in range(head)
            ]
            for token in range(block)
        ]
        assert at == table.tolist()
    assert torch.cat((k.flatten(), v.flatten())).unique().numel() == 2 * block * head


def batch_for(kv, layout, query_heads, scale=1.0):
    _, kv_heads, block, twice = kv.shape
    return native.TreeBatch(
        num_query_heads=query_heads, num_kv_heads=kv_heads, head_size=twice // 2,
        block_size=block, layout=native.LAYOUTS[layout], dtype=native.DTYPES[kv.dtype],
        scale=scale, page_stride=kv.stride(0), head_stride=kv.stride(1),
    )  # fmt: skip


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS)
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "head", "block"),
    [(3, 1, 64, 32), (4, 4, 128, 32), (8, 2, 96, 32), (6, 2, 64, 128), (4, 1, 128, 128)],
)
def test_tree_attention(layout, dtype, query_heads, kv_heads, head, block):
    """Random trees of several requests in one batch, with other rows in between."""
    attention_equals_reference(layout, dtype, query_heads, kv_heads, head, block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("head", [80, 20])
def test_tree_attention_of_odd_head_sizes(dtype, block, head):
    """Not a multiple of the vectors that are summed together, and not even of one."""
    attention_equals_reference("vec", dtype, 3, 1, head, block)


@pytest.mark.parametrize("contexts", [[0, 0, 0], [31, 32, 1], [127, 128, 129], [300, 257, 64]])
@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS)
def test_tree_attention_at_page_borders(layout, dtype, contexts):
    attention_equals_reference(layout, dtype, 3, 1, 64, 128, contexts)


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS)
def test_tree_attention_from_a_first_token_on(layout, dtype):
    attention_equals_reference(layout, dtype, 6, 2, 64, 32, (0, 33, 300), (0, 33, 170))


def test_the_reference_does_not_see_what_is_before_the_first_token():
    """It is the same without those tokens, here a page of them."""
    torch.manual_seed(0)
    kv = torch.randn(4, 1, 32, 128)
    query, table = torch.randn(3, 2, 64), torch.tensor([[2, 1, 3]], dtype=torch.int32)
    fields = {
        "rows": torch.arange(3), "query_start_loc": torch.tensor([0, 3]), "scale": 0.1,
        "layout": "vec", "ancestors": torch.ones(3, 3).tril().bool(),
    }  # fmt: skip

    def attend(table, context, first):
        output = torch.empty_like(query)
        packed_tree_attention_reference(
            query, kv, output, block_table=table, context_lens=torch.tensor([context]),
            first=first, **fields,
        )  # fmt: skip
        return output

    short = attend(table[:, 1:], 40, None)
    assert torch.allclose(attend(table, 72, torch.tensor([32])), short, atol=1e-6)
    assert not torch.allclose(attend(table, 72, None), short, atol=0.01)


def test_sizes_the_kernel_cannot_serve_have_a_reason():
    def reason(layout, dtype, block, head):
        page = torch.empty(1, 1, block, 2 * head, dtype=dtype)
        return native.unsupported(batch_for(page, layout, 1))

    assert "multiple of 16" in reason("vec", torch.float32, 24, 64)
    assert reason("vec", torch.float32, 16, 80) is None
    amx = "multiples of 32|no AMX"  # the second where the compiler knows no AMX either
    assert re.search(amx, reason("amx", torch.bfloat16, 32, 80))
    assert re.search(amx, reason("amx", torch.bfloat16, 16, 64))
    assert re.search(amx, reason("amx", torch.float32, 32, 64))


def attention_equals_reference(
    layout, dtype, query_heads, kv_heads, head, block, contexts=(0, 33, 300), first=None
):
    rng = np.random.default_rng(query_heads)
    torch.manual_seed(query_heads)
    kv = torch.randn(PAGES, kv_heads, block, 2 * head).to(dtype)
    sizes = [1, 7, 40]
    parents = np.concatenate(
        [[-1] + [int(rng.integers(0, i)) for i in range(1, n)] for n in sizes]
    ).astype(np.int32)
    starts = np.cumsum([0, *sizes]).astype(np.int32)
    rows = torch.from_numpy(rng.permutation(60)[: sum(sizes)].copy())
    table = torch.from_numpy(np.stack([rng.permutation(PAGES) for _ in sizes]).astype(np.int32))
    query = torch.randn(60, query_heads, head).to(dtype)
    fields = {
        "rows": rows,
        "query_start_loc": torch.from_numpy(starts),
        "context_lens": torch.tensor(list(contexts), dtype=torch.int32),
        "block_table": table,
    }
    if first is not None:
        fields["first"] = torch.tensor(first, dtype=torch.int32)
    expected = torch.full_like(query, 7)
    mask = torch.from_numpy(ancestor_mask(parents, starts, max(sizes)))
    scale = head**-0.5
    packed_tree_attention_reference(
        query, kv, expected, ancestors=mask, scale=scale, layout=layout, **fields
    )
    batch = batch_for(kv, layout, query_heads, scale)
    assert native.unsupported(batch) is None
    batch.num_requests = len(sizes)
    batch.max_blocks = table.stride(0)
    batch.query_stride = batch.output_stride = query.stride(0)
    batch.rows = rows.data_ptr()
    batch.row_start = fields["query_start_loc"].data_ptr()
    batch.context = fields["context_lens"].data_ptr()
    batch.block_table = table.data_ptr()
    batch.parents = parents.ctypes.data
    batch.first = None if first is None else fields["first"].data_ptr()
    output = torch.full_like(query, 7)
    native.library().specplus_tree_attention(
        ctypes.byref(batch), query.data_ptr(), kv.data_ptr(), output.data_ptr()
    )
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert (output.float() - expected.float()).abs().max() < tolerance
    others = np.setdiff1d(np.arange(60), rows.numpy())
    assert (output[others] == 7).all()  # rows of other requests are not touched
    # The tolerance can tell trees from chains.
    causal = torch.from_numpy(ancestor_mask(*_chains(sizes), max(sizes)))
    wrong = torch.full_like(query, 7)
    packed_tree_attention_reference(
        query, kv, wrong, ancestors=causal, scale=scale, layout=layout, **fields
    )
    assert (wrong.float() - expected.float()).abs().max() > 3 * tolerance


def _chains(sizes):
    parents = np.concatenate([np.arange(-1, n - 1) for n in sizes]).astype(np.int32)
    return parents, np.cumsum([0, *sizes]).astype(np.int32)


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS)
def test_move_slots(layout, dtype):
    """A path is compacted in place: sources and destinations overlap."""
    src = np.array([37, 39, 40, 70, 71], np.int64)
    dst = np.array([36, 37, 38, 39, 40], np.int64)
    caches = [torch.randn(4, 2, 32, 128).to(dtype) for _ in range(3)]
    expected = [c.clone() for c in caches]
    for cache in expected:
        move_slots_reference(cache, torch.from_numpy(src), torch.from_numpy(dst), layout)
    pointers = (ctypes.c_void_p * 3)(*(c.data_ptr() for c in caches))
    native.library().specplus_move_slots(
        ctypes.byref(batch_for(caches[0], layout, 2)), pointers, 3,
        src.ctypes.data, dst.ctypes.data, len(src),
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=False))
    k, _ = page_offsets(layout, 32, 64)
    flat = caches[0].view(4, 2, -1)
    assert torch.equal(flat[36 // 32, :, k[36 % 32]], expected[0].view(4, 2, -1)[1, :, k[4]])


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS)
@pytest.mark.parametrize("seed", range(5))
def test_move_slots_along_any_path(layout, dtype, seed):
    """Two requests' accepted rows, each moved to the consecutive slots after its root."""
    rng = np.random.default_rng(seed)
    src, dst = [], []
    for root in (int(rng.integers(0, 60)), 128 + int(rng.integers(0, 60))):
        path = np.sort(rng.choice(np.arange(1, 60), rng.integers(1, 20), replace=False))
        src += (root + path).tolist()
        dst += (root + 1 + np.arange(len(path))).tolist()
    src, dst = np.array(src, np.int64), np.array(dst, np.int64)
    cache = torch.randn(8, 3, 32, 128).to(dtype)
    expected = cache.clone()
    move_slots_reference(expected, torch.from_numpy(src), torch.from_numpy(dst), layout)
    native.library().specplus_move_slots(
        ctypes.byref(batch_for(cache, layout, 3)), (ctypes.c_void_p * 1)(cache.data_ptr()), 1,
        src.ctypes.data, dst.ctypes.data, len(src),
    )  # fmt: skip
    assert torch.equal(cache, expected)


def test_vllms_cache_writer_uses_our_layouts():
    """A vLLM that packs its pages differently must fail here, not in a user's text."""
    from vllm_specplus.engine.attention.cpu import cache_layout

    for block, head in [(32, 64), (128, 64), (32, 80), (128, 128)]:
        assert cache_layout("vec", torch.float32, block, head) == "vec"
    if torch.cpu._is_amx_tile_supported():
        for block, head in [(32, 64), (128, 64), (128, 128)]:
            assert cache_layout("amx", torch.bfloat16, block, head) == "amx"
