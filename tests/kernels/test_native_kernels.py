"""The C++ kernels equal their torch references."""

from __future__ import annotations

import ctypes
import itertools
import math
import re

import numpy as np
import pytest
import torch

from vllm_specplus.kernels import native
from vllm_specplus.kernels.reference import (
    gather_kv,
    move_slots_reference,
    packed_tree_attention_reference,
    page_offsets,
    top_k_reference,
)
from vllm_specplus.tree import ancestor_mask, row_depths

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


def batch_for(kv, layout, query_heads, scale=1.0, dtype=None, fp8=None):
    _, kv_heads, block, twice = kv.shape
    code = native.DTYPES[dtype or kv.dtype]
    return native.TreeBatch(
        num_query_heads=query_heads, num_kv_heads=kv_heads, head_size=twice // 2,
        value_size=twice // 2, block_size=block, layout=native.LAYOUTS[layout], dtype=code,
        cache_dtype=native.FP8[fp8][0] if fp8 else code, value_scale=1.0,
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


#: What a layer may do beside plain attention, alone and together.
FEATURES = {
    "window": {"window": 5}, "long window": {"window": 290}, "window of one": {"window": 1},
    "chunk": {"chunk": 35}, "chunk of one": {"chunk": 1},
    "soft cap": {"soft_cap": 1.5}, "ALiBi": {"slopes": True}, "sinks": {"sinks": True},
    "Gemma 2": {"window": 40, "soft_cap": 2.0}, "gpt-oss": {"window": 17, "sinks": True},
    "FP8": {"fp8": "fp8_e4m3"}, "FP8 of two bits": {"fp8": "fp8_e5m2", "value_scale": 0.5},
    "all": {"window": 33, "chunk": 30, "soft_cap": 2.0, "slopes": True, "sinks": True},
    "all, FP8": {"window": 33, "chunk": 30, "soft_cap": 2.0, "slopes": True, "sinks": True,
                 "fp8": "fp8", "value_scale": 1.5},
}  # fmt: skip


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS)
def test_tree_attention_with_features(layout, dtype, features):
    if layout == "amx" and "fp8" in features:
        pytest.skip("bytes in the AMX layout are left to the reference")
    attention_equals_reference(layout, dtype, 6, 2, 64, 32, features=features)
    attention_equals_reference(layout, dtype, 6, 2, 64, 32, (0, 33, 300), (0, 30, 170), features)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_every_byte_is_the_number_that_torch_reads(name):
    """As values of a single token, by registers and behind them."""
    size = 248  # 7 numbers are beyond the last whole register
    for begin in (0, 8):
        codes = torch.arange(begin, begin + size, dtype=torch.uint8)
        expected = codes.view(native.FP8[name][1]).float()
        codes[~expected.isfinite()], expected[~expected.isfinite()] = 0, 0.0
        kv = torch.zeros(1, 1, 32, 2 * size, dtype=torch.uint8)
        kv.view(-1)[32 * size : 33 * size] = codes
        batch = batch_for(kv, "vec", 1, dtype=torch.float32, fp8=name)
        batch.num_requests, batch.max_blocks, batch.query_stride = 1, 1, size
        batch.output_stride = size
        numbers = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [0], [0], [-1])]
        rows = torch.zeros(1, dtype=torch.int64)
        batch.rows = rows.data_ptr()
        batch.row_start, batch.context, batch.block_table, batch.parents = (
            each.data_ptr() for each in numbers
        )
        query, output = torch.zeros(1, 1, size), torch.full((1, 1, size), 7.0)
        native.library().specplus_tree_attention(
            ctypes.byref(batch), query.data_ptr(), kv.data_ptr(), output.data_ptr()
        )
        assert torch.equal(output[0, 0], expected)


@pytest.mark.parametrize("name", ["window", "chunk", "soft_cap", "slopes", "sinks"])
def test_every_feature_changes_something(name):
    """Negative control of the comparison above."""
    plain, with_it = (
        attention_equals_reference("vec", torch.float32, 6, 2, 64, 32, features=features)
        for features in ({}, {name: FEATURES["all"][name]})
    )
    assert (plain - with_it).abs().max() > 0.01


def test_the_reference_does_what_a_loop_over_positions_does():
    """In float64: window, soft cap, ALiBi and sink of every row, head and visible position."""
    torch.manual_seed(3)
    kv = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    query = torch.randn(5, 2, 16, dtype=torch.float64)
    parents, depths = [-1, 0, 1, 0, 3], [0, 1, 2, 1, 2]
    slopes, sinks = torch.tensor([0.5, 0.1]), torch.tensor([0.3, -1.0])
    context, window, chunk, cap = 40, 39, 21, 1.5
    output = torch.empty_like(query)
    starts = torch.tensor([0, 5], dtype=torch.int32)
    mask = ancestor_mask(np.array(parents, np.int32), starts.numpy(), 5)
    packed_tree_attention_reference(
        query, kv, output, rows=torch.arange(5), query_start_loc=starts,
        context_lens=torch.tensor([context]), block_table=torch.tensor([[2, 0, 1]]),
        ancestors=torch.from_numpy(mask), scale=0.25, layout="vec",
        depths=torch.tensor(depths), window=window, chunk=chunk, soft_cap=cap, slopes=slopes,
        sinks=sinks,
    )  # fmt: skip
    keys, values = gather_kv(kv, torch.tensor([2, 0, 1]), context + 5, "vec")
    for row, head in itertools.product(range(5), range(2)):
        own, seen = context + depths[row], {j: j for j in range(context)}
        node = row
        while node >= 0:
            seen[context + depths[node]] = context + node
            node = parents[node]
        scores, places = [], []
        for position, place in seen.items():
            if own - position < window and own // chunk == position // chunk:
                score = float(keys[0, place] @ query[row, head]) * 0.25
                score = cap * math.tanh(score / cap) + float(slopes[head]) * (position - own)
                scores.append(score)
                places.append(place)
        weights = torch.tensor([*scores, float(sinks[head])], dtype=torch.float64).softmax(0)[:-1]
        expected = weights @ values[0, places]
        assert torch.allclose(output[row, head], expected, atol=1e-5)


def attention_equals_reference(
    layout, dtype, query_heads, kv_heads, head, block, contexts=(0, 33, 300), first=None,
    features=None,
):  # fmt: skip
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
    features = dict(features or {})
    fp8 = features.get("fp8")
    if fp8 is not None:
        features["fp8"] = native.FP8[fp8][1]
        kv = kv.to(features["fp8"]).view(torch.uint8)
    for name, values in (
        ("slopes", 2.0 ** -torch.arange(1.0, query_heads + 1)),
        ("sinks", torch.linspace(-1, 4, query_heads)),
    ):
        if name in features:
            features[name] = values
    depths = torch.from_numpy(row_depths(parents, starts))
    fields |= features | {"depths": depths}
    expected = torch.full_like(query, 7)
    mask = torch.from_numpy(ancestor_mask(parents, starts, max(sizes)))
    scale = head**-0.5
    packed_tree_attention_reference(
        query, kv, expected, ancestors=mask, scale=scale, layout=layout, **fields
    )
    batch = batch_for(kv, layout, query_heads, scale, query.dtype, fp8)
    batch.value_scale = features.get("value_scale", 1.0)
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
    batch.window, batch.soft_cap = features.get("window", 0), features.get("soft_cap", 0.0)
    batch.chunk = features.get("chunk", 0)
    if features:
        batch.depths = depths.data_ptr()
    for name in ("slopes", "sinks"):
        if name in features:
            setattr(batch, name, features[name].data_ptr())
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
    # A row that sees itself alone is the same in both.
    if 1 not in (features.get("window"), features.get("chunk")):
        assert (wrong.float() - expected.float()).abs().max() > 3 * tolerance
    return output.float()


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
        if torch.cpu._is_avx512_supported() and head % 32 == 0:
            for fp8 in ("fp8_e4m3", "fp8_e5m2"):
                assert cache_layout("vec", torch.uint8, block, head, fp8) == "vec"
    if torch.cpu._is_amx_tile_supported():
        for block, head in [(32, 64), (128, 64), (128, 128)]:
            assert cache_layout("amx", torch.bfloat16, block, head) == "amx"
