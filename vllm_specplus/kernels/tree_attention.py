"""Attention of draft trees over a paged KV cache.

All functions share one set of arguments. ``R`` is the number of requests, ``T`` the number of
tree rows of all requests, ``N`` at least the largest number of rows of one request, ``H`` and
``KH`` the number of query and KV heads (query head ``h`` reads KV head ``h // (H / KH)``) and
``D`` the head size:

``query`` [T, H, D]
    Rows request by request; each request's root first.
``key_cache``, ``value_cache`` [num_blocks, block_size, KH, D]
    Views of the paged cache with equal strides, the last one 1. The other strides are free, so
    both of vLLM's physical orders (token-major ``NHD`` and head-major ``HND``) fit. K and V of the
    rows are in the cache already, at positions ``context_len + row`` of their request.
``query_start_loc`` int32 [R + 1]
    Offsets of the requests in the rows.
``context_lens`` int32 [R]
    Tokens in the cache before the root; may be 0.
``block_table`` int32 [R, max_blocks]
    Cache blocks of each request.
``ancestors`` bool [T, N]
    May row ``i`` see row ``j`` of its request. True where these are the same row.
``scale``
    Factor of the scores ``query @ key``.
``first`` int32 [R] or None
    First token of the context that is visible, at most ``context_len``; by default all are.
``key_starts`` int32 [R + 1] or None
    Offsets of the requests in all K rows of their trees, where some attend to nothing any more,
    being keys of others only: those of a request come before its rows of ``query``. ``depths`` and
    the columns of ``ancestors`` are then of all rows. By default ``query_start_loc``. Where a
    request has none, its rows see its context, of at least one token, and nothing else.
``ends`` int32 [R] or None
    End of the context that is visible, at most ``context_len``, which the roots' positions follow;
    by default that is ``context_len`` itself.
``readable`` bool [num_blocks, block_size] or None
    Which slots of a context are visible; by default all are.
``depths`` int32 [K] or None
    Positions of the rows less those of their roots: for ``window``, ``chunk`` and ``slopes`` only.
``window``
    How many positions a row sees, its own among them; 0: all.
``chunk``
    A row sees its own chunk of so many positions; 0: all.
``soft_cap``
    Scores become ``soft_cap * tanh(score / soft_cap)``; 0: they do not.
``slopes`` float32 [H] or None
    Of ALiBi: a score falls by so much for every position between key and query.
``sinks`` float [H] or None
    A score beside all others, whose key has no value.

``tree_attention_reference`` of ``reference.py`` is their definition. They return the output
[T, H, D] and the natural logarithm of the sum of the exponentiated scores
(LSE), float32 [H, T], the shapes that FlashAttention and vLLM's ``merge_attn_states`` use.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
import triton
import triton.language as tl


@triton.jit
def _load_keys_and_values(
    key_cache,
    value_cache,
    block_table,
    positions,
    valid,
    dims,
    dim_valid,
    block_stride,
    token_stride,
    BLOCK_SIZE: tl.constexpr,
):
    """K and V of one KV head at cache positions of one request: [BLOCK_N, BLOCK_D] each."""
    blocks = tl.load(block_table + positions // BLOCK_SIZE, mask=valid, other=0)
    # int64: a cache has more than 2**31 elements.
    slots = blocks.to(tl.int64) * block_stride + (positions % BLOCK_SIZE) * token_stride
    offsets = slots[:, None] + dims[None, :]
    # Unwritten slots may hold NaN, which a weight of 0 would not cancel: load them as 0.
    mask = valid[:, None] & dim_valid[None, :]
    keys = tl.load(key_cache + offsets, mask=mask, other=0.0)
    values = tl.load(value_cache + offsets, mask=mask, other=0.0)
    return keys, values


@triton.jit
def _attend(
    queries,
    keys,
    values,
    visible,
    distance,
    scale_log2,
    cap_log2,
    slope_log2,
    acc,
    row_max,
    row_sum,
    CAPPED: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """One step of the online softmax, with scores in base 2 (``exp2`` is the GPU's instruction).

    ``acc`` [BLOCK_M, BLOCK_D] and ``row_sum`` [BLOCK_M] are multiples of ``2 ** row_max``;
    ``distance`` [BLOCK_M, BLOCK_N] of the keys from the rows, at most 0 where they are visible.
    """
    # IEEE: by default float32 operands are rounded to TF32. It changes nothing for 16-bit ones.
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale_log2
    if CAPPED:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)), which infinities of exp leave right.
        TWICE: tl.constexpr = 2 * 1.4426950408889634
        scores = cap_log2 * (1.0 - 2.0 / (1.0 + tl.exp2(TWICE * scores / cap_log2)))
    if ALIBI:
        scores += slope_log2[:, None] * distance
    scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # The maximum of a row that has seen no key is -inf, and -inf - -inf is NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    acc = acc * decay[:, None]
    acc += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return acc, new_max, row_sum * decay + tl.sum(weights, 1)


# Lengths and counts that change from step to step must not select another compiled variant.
@triton.jit(
    do_not_specialize=["block_table_stride", "ancestors_stride", "row_blocks", "total_rows"]
)
def _tree_attention_kernel(
    output,  # [splits, T, H, D]
    lse,  # [splits, H, T]
    query,
    key_cache,
    value_cache,
    query_start_loc,
    context_lens,
    first,
    block_table,
    ancestors,
    depths,
    slopes,
    sinks,
    key_starts,
    ends,
    readable,
    scale_log2,
    cap_log2,
    query_row_stride,
    query_head_stride,
    cache_block_stride,
    cache_token_stride,
    cache_head_stride,
    block_table_stride,
    ancestors_stride,
    row_blocks,
    total_rows,
    CONTEXT: tl.constexpr,
    FIRST: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPPED: tl.constexpr,
    ALIBI: tl.constexpr,
    SINKS: tl.constexpr,
    KEYS: tl.constexpr,
    ENDS: tl.constexpr,
    READABLE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attention of ``BLOCK_M // GROUP`` rows of one request to one KV head.

    A program holds all ``GROUP`` query heads of its KV head, so that it loads each K and V tile
    once for them and its products have at least 16 rows, the least ``tl.dot`` takes. With
    ``CONTEXT`` the programs along the third grid axis divide the context among them, and the last
    one attends to the tree as well; without, only the tree is attended to.
    """
    LN_2: tl.constexpr = 0.6931471805599453
    LOG2_E: tl.constexpr = 1.4426950408889634
    ROWS: tl.constexpr = BLOCK_M // GROUP
    request = tl.program_id(0) // row_blocks
    first_row = (tl.program_id(0) % row_blocks) * ROWS
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)

    start = tl.load(query_start_loc + request)
    num_rows = tl.load(query_start_loc + request + 1) - start
    if first_row >= num_rows:
        return
    context_len = tl.load(context_lens + request)
    end_of_text = tl.load(ends + request) if ENDS else context_len
    # Of the rows that are keys: the request's first one, and how many.
    key_start = tl.load(key_starts + request) if KEYS else start
    num_keys = tl.load(key_starts + request + 1) - key_start if KEYS else num_rows
    block_table += request.to(tl.int64) * block_table_stride
    key_cache += kv_head * cache_head_stride
    value_cache += kv_head * cache_head_stride

    lanes = tl.arange(0, BLOCK_M)
    row_in_request = first_row + lanes // GROUP
    heads = kv_head * GROUP + lanes % GROUP
    # The last lanes are idle when GROUP does not divide BLOCK_M.
    row_valid = (lanes < ROWS * GROUP) & (row_in_request < num_rows)
    rows = (start + row_in_request).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    dim_valid = dims < HEAD_SIZE

    query_offsets = rows * query_row_stride + heads * query_head_stride
    queries = tl.load(
        query + query_offsets[:, None] + dims[None, :],
        mask=row_valid[:, None] & dim_valid[None, :],
        other=0.0,
    )
    acc = tl.full([BLOCK_M, BLOCK_D], 0.0, dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.full([BLOCK_M], 0.0, dtype=tl.float32)
    if SINKS:  # once, where the tree is
        last = split == num_splits - 1
        sink = tl.load(sinks + heads, mask=row_valid, other=0.0).to(tl.float32) * LOG2_E
        row_max = tl.where(last, sink, row_max)
        row_sum = tl.where(last, 1.0, row_sum)
    slope_log2 = row_sum  # unused without ALiBi
    if ALIBI:
        slope_log2 = tl.load(slopes + heads, mask=row_valid, other=0.0) * LOG2_E
    own = end_of_text + row_in_request  # unused without depths
    if WINDOW > 0 or CHUNK > 0 or ALIBI:
        own_depths = depths + key_start + num_keys - num_rows + row_in_request
        own = end_of_text + tl.load(own_depths, mask=row_valid, other=0)
    # The first position that each row sees, and that the root sees, which is before all others'.
    earliest = own * 0
    begin = tl.load(first + request) if FIRST else 0
    if WINDOW > 0:
        earliest = tl.maximum(earliest, own - WINDOW + 1)
        begin = tl.maximum(begin, end_of_text - WINDOW + 1)
    if CHUNK > 0:
        earliest = tl.maximum(earliest, own // CHUNK * CHUNK)
        begin = tl.maximum(begin, end_of_text // CHUNK * CHUNK)

    if CONTEXT:
        seen = tl.cdiv(end_of_text, BLOCK_N) - begin // BLOCK_N
        span = tl.cdiv(seen, num_splits) * BLOCK_N
        tiles = begin // BLOCK_N * BLOCK_N + split * span
        end = tl.minimum(tiles + span, end_of_text)
        for tile in range(tiles, end, BLOCK_N):
            positions = tile + tl.arange(0, BLOCK_N)
            valid = (positions >= begin) & (positions < end)
            keys, values = _load_keys_and_values(
                key_cache,
                value_cache,
                block_table,
                positions,
                valid,
                dims,
                dim_valid,
                cache_block_stride,
                cache_token_stride,
                BLOCK_SIZE,
            )
            visible = valid[None, :]
            if READABLE:
                blocks = tl.load(block_table + positions // BLOCK_SIZE, mask=valid, other=0)
                slots = blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
                visible = visible & (tl.load(readable + slots, mask=valid, other=0) != 0)[None, :]
            if WINDOW > 0 or CHUNK > 0:
                visible = visible & (positions[None, :] >= earliest[:, None])
            acc, row_max, row_sum = _attend(
                queries,
                keys,
                values,
                visible,
                positions[None, :] - own[:, None],
                scale_log2,
                cap_log2,
                slope_log2,
                acc,
                row_max,
                row_sum,
                CAPPED,
                ALIBI,
            )

    tree_end = tl.where(split == num_splits - 1, num_keys, 0)
    for tile in range(0, tree_end, BLOCK_N):
        nodes = tile + tl.arange(0, BLOCK_N)
        valid = nodes < num_keys
        keys, values = _load_keys_and_values(
            key_cache,
            value_cache,
            block_table,
            context_len + nodes,
            valid,
            dims,
            dim_valid,
            cache_block_stride,
            cache_token_stride,
            BLOCK_SIZE,
        )
        related = tl.load(
            ancestors + rows[:, None] * ancestors_stride + nodes[None, :],
            mask=row_valid[:, None] & valid[None, :],
            other=0,
        )
        visible = related != 0
        places = end_of_text + nodes
        if WINDOW > 0 or CHUNK > 0 or ALIBI:
            places = end_of_text + tl.load(depths + key_start + nodes, mask=valid, other=0)
        if WINDOW > 0 or CHUNK > 0:
            visible = visible & (places[None, :] >= earliest[:, None])
        acc, row_max, row_sum = _attend(
            queries,
            keys,
            values,
            visible,
            places[None, :] - own[:, None],
            scale_log2,
            cap_log2,
            slope_log2,
            acc,
            row_max,
            row_sum,
            CAPPED,
            ALIBI,
        )

    # A split without keys has output 0 and LSE -inf.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    row_lse = (row_max + tl.log2(row_sum)) * LN_2
    acc /= row_sum[:, None]

    num_heads = tl.num_programs(1) * GROUP
    output_offsets = ((split * total_rows + rows) * num_heads + heads) * HEAD_SIZE
    tl.store(
        output + output_offsets[:, None] + dims[None, :],
        acc.to(output.dtype.element_ty),
        mask=row_valid[:, None] & dim_valid[None, :],
    )
    tl.store(lse + (split * num_heads + heads) * total_rows + rows, row_lse, mask=row_valid)


# As above; and one variant serves all numbers of splits that are chosen by default.
@triton.jit(do_not_specialize=["num_splits"])
def _merge_splits_kernel(
    output,  # [T, H, D]
    lse,  # [H, T]
    split_output,  # [splits, T, H, D]
    split_lse,  # [splits, H, T]
    num_splits,
    HEAD_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Join the splits of one row and head, each weighted by its sum of exponentiated scores."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    total_rows = tl.num_programs(0)
    num_heads = tl.num_programs(1)
    splits = tl.arange(0, BLOCK_S).to(tl.int64)
    valid = splits < num_splits
    dims = tl.arange(0, BLOCK_D)
    dim_valid = dims < HEAD_SIZE

    lse_offsets = (splits * num_heads + head) * total_rows + row
    split_lses = tl.load(split_lse + lse_offsets, mask=valid, other=float("-inf"))
    # Finite: the last split holds the tree, in which every row sees itself.
    largest = tl.max(split_lses, 0)
    weights = tl.exp(split_lses - largest)
    total = tl.sum(weights, 0)

    output_offsets = ((splits * total_rows + row) * num_heads + head) * HEAD_SIZE
    split_outputs = tl.load(
        split_output + output_offsets[:, None] + dims[None, :],
        mask=valid[:, None] & dim_valid[None, :],
        other=0.0,
    )
    merged = tl.sum(split_outputs * weights[:, None], 0) / total
    tl.store(
        output + (row * num_heads + head) * HEAD_SIZE + dims,
        merged.to(output.dtype.element_ty),
        mask=dim_valid,
    )
    tl.store(lse + head * total_rows + row, largest + tl.log(total))


def tree_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    ancestors: torch.Tensor,
    scale: float,
    *,
    part: Literal["tree", "all"],
    max_rows: int,
    max_context_len: int = 0,
    num_splits: int | None = None,
    first: torch.Tensor | None = None,
    depths: torch.Tensor | None = None,
    window: int = 0,
    chunk: int = 0,
    soft_cap: float = 0.0,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    key_starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    readable: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tree attention by Triton; see the module for the arguments and the result.

    ``part="tree"`` leaves the context (and ``first``) to another kernel, ``part="all"`` needs none.
    Sinks are scores of the part that is computed: of two that are joined, give them to one.
    The output has the data type of ``query``, the LSE is float32.

    Nothing is read back from the device: ``max_rows`` (rows of the largest request) and
    ``max_context_len`` size the launch. ``num_splits`` programs share the context of a request;
    by default as many as fill the GPU.
    """
    total_rows, num_heads, head_size = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    num_requests = context_lens.shape[0]
    group = num_heads // num_kv_heads
    assert key_cache.stride() == value_cache.stride()
    assert key_cache.stride(3) == query.stride(2) == ancestors.stride(1) == 1
    assert block_table.stride(1) == 1

    block_m, block_n, block_d, num_warps = _tile_shape(
        group, max_rows, head_size, query.element_size()
    )
    row_blocks = triton.cdiv(max_rows, block_m // group)
    if part == "tree":
        num_splits = 1
    elif num_splits is None:
        programs = num_requests * row_blocks * num_kv_heads
        seen = min(max_context_len, window or max_context_len, chunk or max_context_len)
        num_splits = _default_num_splits(programs, seen, query.device)

    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(num_heads, total_rows, dtype=torch.float32, device=query.device)
    split_output, split_lse = output, lse
    if num_splits > 1:
        split_output = lse.new_empty(num_splits, *output.shape)
        split_lse = lse.new_empty(num_splits, *lse.shape)

    _tree_attention_kernel[(num_requests * row_blocks, num_kv_heads, num_splits)](
        split_output,
        split_lse,
        query,
        key_cache,
        value_cache,
        query_start_loc,
        context_lens,
        context_lens if first is None else first,
        block_table,
        ancestors,
        context_lens if depths is None else depths,
        lse if slopes is None else slopes,
        lse if sinks is None else sinks,
        query_start_loc if key_starts is None else key_starts,
        context_lens if ends is None else ends,
        ancestors if readable is None else readable,
        scale * math.log2(math.e),
        soft_cap * math.log2(math.e),
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_table.stride(0),
        ancestors.stride(0),
        row_blocks,
        total_rows,
        CONTEXT=part == "all",
        FIRST=first is not None,
        WINDOW=window,
        CHUNK=chunk,
        CAPPED=soft_cap > 0,
        ALIBI=slopes is not None,
        SINKS=sinks is not None,
        KEYS=key_starts is not None,
        ENDS=ends is not None,
        READABLE=readable is not None,
        GROUP=group,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=2,
    )
    if num_splits > 1:
        _merge_splits_kernel[(total_rows, num_heads)](
            output,
            lse,
            split_output,
            split_lse,
            num_splits,
            HEAD_SIZE=head_size,
            BLOCK_S=triton.next_power_of_2(max(num_splits, MAX_SPLITS)),
            BLOCK_D=block_d,
        )
    return output, lse


def latent_group(num_heads: int) -> int:
    """Return how many query heads of multi-head latent attention one program attends for."""
    return next(group for group in (16, 8, 4, 2, 1) if num_heads % group == 0)


def latent_tree_attention(
    query: torch.Tensor,
    latents: torch.Tensor,
    query_start_loc: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    ancestors: torch.Tensor,
    scale: float,
    value_size: int,
    *,
    max_rows: int,
    max_context_len: int = 0,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Multi-head latent attention of trees: [T, H, value_size], in the data type of ``query``.

    ``query`` [T, H, D] with the projections of the keys absorbed; ``latents``
    [num_blocks, block_size, D], of which keys are all elements and values the first ``value_size``,
    for all heads; the rest as in :func:`tree_attention`. The same kernel computes it: groups of
    heads take the same rows for theirs, and what it makes of the other elements is left out.
    """
    groups = query.shape[1] // latent_group(query.shape[1])
    rows = latents[:, :, None].expand(-1, -1, groups, -1)
    output, _ = tree_attention(
        query, rows, rows, query_start_loc, context_lens, block_table, ancestors, scale,
        part="all", max_rows=max_rows, max_context_len=max_context_len, num_splits=num_splits,
    )  # fmt: skip
    return output[..., :value_size]


def _tile_shape(
    group: int, max_rows: int, head_size: int, element_size: int
) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_D (powers of two, at least 16 for ``tl.dot``) and the warps.

    Chosen by the compiler's reports for compute capabilities 8.0 to 12.0: next to no registers
    spill, and all variants fit into the 99 KiB of shared memory that the smaller GPUs have.
    """
    block_d = max(16, triton.next_power_of_2(head_size))
    # Largest tiles, in elements. float32 products use no tensor cores and more registers.
    query_tile, key_tile = (8192, 8192) if element_size < 4 else (4096, 2048)
    block_n = max(16, min(64, key_tile // block_d))
    block_m = min(64, query_tile // block_d, triton.next_power_of_2(max_rows * group))
    block_m = max(16, block_m, triton.next_power_of_2(group))
    num_warps = 4 if block_m * block_d <= 4096 and element_size < 4 else 8
    return block_m, block_n, block_d, num_warps


def variants(group: int, head_size: int, element_size: int, max_rows: int) -> list[int]:
    """Return one number of rows, up to ``max_rows``, for every variant that the largest request of
    a batch selects; the other arguments are those of a model's layer."""
    chosen = {}
    for rows in range(1, max_rows + 1):
        chosen.setdefault(_tile_shape(group, rows, head_size, element_size), rows)
    return list(chosen.values())


#: Shorter parts of the context cost more to join than they save.
MIN_SPLIT_TOKENS = 256
MAX_SPLITS = 32


def _default_num_splits(programs: int, max_context_len: int, device: torch.device) -> int:
    """Splits of the context such that ``programs`` per split give each processor two programs."""
    splits = 2 * _num_processors(device) // programs
    return max(1, min(splits, MAX_SPLITS, max_context_len // MIN_SPLIT_TOKENS))


@functools.cache
def _num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the CPU, on which the interpreter runs."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
