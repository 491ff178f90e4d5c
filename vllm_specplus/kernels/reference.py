"""Torch references of the kernels: the definition of what they compute.

Used by the tests as oracles, and by the engine where the C++ kernels cannot be
built.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

import torch


def top_k_reference(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest ``k`` entries of each row, best first, ties to the lower index.

    ``logits`` [rows, V]; returns (ids int32 [rows, k], values float32 [rows, k]).
    A stable sort keeps equal values in index order, which ``torch.topk`` does not.
    """
    values, ids = logits.float().sort(dim=-1, descending=True, stable=True)
    return ids[:, :k].to(torch.int32).contiguous(), values[:, :k].contiguous()


def masked_scores(
    scores: torch.Tensor,
    visible: torch.Tensor,
    places: torch.Tensor | None,
    window: int,
    chunk: int,
    soft_cap: float,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Makes of the ``scores`` [H, n, S] of n rows what the softmax is of: [H, n, S], or
    [H, n, S + 1] with ``sinks``.

    S keys, the last of which are those of a tree, among them the rows' own as the last n;
    ``visible`` bool [n, S] as far as the tree says; ``places`` int [>= n] positions of the tree's
    keys, needed for ``window``, ``chunk`` and ``slopes``. These and the others as in
    ``tree_attention.py``. What is not seen is -inf.
    """
    if soft_cap:
        scores = soft_cap * (scores / soft_cap).tanh()
    if places is not None and (window or chunk or slopes is not None):
        context = scores.shape[-1] - len(places)
        own = places[len(places) - scores.shape[-2] :]
        positions = torch.cat((torch.arange(context, device=own.device), places))
        distance = positions[None] - own[:, None]
        if window:
            visible = visible & (distance > -window)
        if chunk:
            visible = visible & (distance >= -(own % chunk)[:, None])
        if slopes is not None:
            scores = scores + slopes[:, None, None] * distance
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        beside = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat((scores, beside), -1)
    return scores


def tree_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    ancestors: torch.Tensor,
    scale: float,
    part: Literal["context", "tree", "all"] = "all",
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
    """The definition of tree attention, computed in float32; arguments and result are as
    ``tree_attention.py`` has them.

    ``part``: the keys that are attended to, the cached context, the tree rows, or both.
    A row without any key (``part="context"`` and no context) has output 0 and LSE -inf.
    """
    block_size, num_kv_heads = key_cache.shape[1:3]
    group = query.shape[1] // num_kv_heads
    output = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = output.new_empty(query.shape[1], query.shape[0])

    starts = query_start_loc.tolist()
    key_offsets = starts if key_starts is None else key_starts.tolist()
    root_at = context_lens if ends is None else ends
    for request, context_len in enumerate(context_lens.tolist()):
        rows = slice(starts[request], starts[request + 1])
        nodes = slice(key_offsets[request], key_offsets[request + 1])
        num_rows, num_nodes = rows.stop - rows.start, nodes.stop - nodes.start
        positions = torch.arange(context_len + num_nodes, device=query.device)
        visible = ancestors.new_ones(num_rows, context_len + num_nodes)
        visible[:, context_len:] = ancestors[rows, :num_nodes]
        visible[:, int(root_at[request]) : context_len] = False
        if first is not None:
            visible[:, : int(first[request])] = False
        if part == "context":
            visible[:, context_len:] = False
        elif part == "tree":
            visible[:, :context_len] = False

        blocks = block_table[request, positions // block_size].long()
        if readable is not None:
            text = positions[:context_len]
            visible[:, :context_len] &= readable[blocks[:context_len], text % block_size]
        keys = key_cache[blocks, positions % block_size].float()
        values = value_cache[blocks, positions % block_size].float()
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))

        scores = torch.einsum("qhd,khd->hqk", query[rows].float(), keys) * scale
        places = None if depths is None else root_at[request] + depths[nodes]
        scores = masked_scores(scores, visible, places, window, chunk, soft_cap, slopes, sinks)
        lse[:, rows] = torch.logsumexp(scores, dim=-1)
        # softmax of a row without keys is 0 / 0
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)[..., : len(positions)]
        output[rows] = torch.einsum("hqk,khd->qhd", weights, values)
    return output, lse


@functools.lru_cache
def page_offsets(layout: str, block_size: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where vLLM's CPU cache keeps K and V of one page and KV head.

    Returns two int64 [block_size, head_size] tables of element offsets from the
    start of the page's head; the layouts are described in ``cpu/kernels.cpp``.
    """
    token = torch.arange(block_size)[:, None]
    dim = torch.arange(head_size)[None, :]
    if layout == "vec":
        k = dim * block_size + token
        v = token * head_size + dim
    elif layout == "amx":
        k = token // 16 * 16 * head_size + dim // 2 * 32 + token % 16 * 2 + dim % 2
        v = dim // 16 * 16 * block_size + token // 2 * 32 + dim % 16 * 2 + token % 2
    else:
        raise ValueError(f"unknown KV cache layout {layout!r}")
    return k, v + block_size * head_size


def gather_kv(
    kv_cache: torch.Tensor, block_table: torch.Tensor, num_tokens: int, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the first ``num_tokens`` tokens of one request.

    ``kv_cache`` [pages, KV heads, block_size, 2 * head_size] (vLLM's CPU cache),
    ``block_table`` int32 [max_blocks]. Returns two [KV heads, num_tokens,
    head_size] tensors of the cache's dtype.
    """
    _, heads, block_size, twice = kv_cache.shape
    pages = block_table[: -(-num_tokens // block_size)].long()
    flat = kv_cache[pages].reshape(len(pages), heads, block_size * twice)
    out = []
    for table in page_offsets(layout, block_size, twice // 2):
        x = flat[:, :, table.reshape(-1)].view(len(pages), heads, block_size, twice // 2)
        out.append(x.transpose(0, 1).reshape(heads, -1, twice // 2)[:, :num_tokens])
    return out[0], out[1]


def _by_request(
    rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    context_lens: torch.Tensor,
    ancestors: torch.Tensor,
) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor]]:
    """Yields each request's number, which of the tree rows are its n, where these are among the
    batch's rows, int64 [n], and what they see of its context and of each other, bool [n, S]."""
    starts = query_start_loc.tolist()
    for r, context in enumerate(context_lens.tolist()):
        own = slice(starts[r], starts[r + 1])
        n = own.stop - own.start
        visible = torch.ones(n, context + n, dtype=torch.bool)
        visible[:, context:] = ancestors[own, :n]
        yield r, own, rows[own], visible


def packed_tree_attention_reference(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    *,
    rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    ancestors: torch.Tensor,
    scale: float,
    layout: str,
    depths: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
    window: int = 0,
    chunk: int = 0,
    soft_cap: float = 0.0,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    fp8: torch.dtype | None = None,
    value_scale: float = 1.0,
) -> None:
    """Writes the attention of all tree rows into ``output``, in float32 arithmetic.

    Over vLLM's packed CPU pages; :func:`tree_attention_reference` is the one over CUDA pages.

    ``query`` and ``output`` [batch rows, query heads, head_size]; ``kv_cache`` and ``layout`` as
    in :func:`gather_kv`; ``window``: positions that a row sees, its own among them (0: all);
    ``chunk``: it sees its own chunk of so many positions (0: all); ``soft_cap``: scores become
    ``soft_cap * tanh(score / soft_cap)`` (0: they do not); ``slopes`` float32 [query heads] of
    ALiBi; ``sinks`` float32 [query heads], a score beside all others; ``fp8``: what the bytes of a
    cache of uint8 are; ``value_scale``: a factor of the cache's values, that of the keys being in
    ``scale``; the rest as in ``engine.attention.base.TreeAttentionMetadata``. ``depths`` are needed
    for windows, chunks and slopes only.
    """
    for r, own, row, visible in _by_request(rows, query_start_loc, context_lens, ancestors):
        n, total = visible.shape
        k, v = gather_kv(kv_cache, block_table[r], total, layout)
        if fp8 is not None:
            k, v = k.contiguous().view(fp8), v.contiguous().view(fp8)
        group = query.shape[1] // k.shape[0]
        q = query[row].transpose(0, 1).float()  # [query heads, n, D]
        k = k.float().repeat_interleave(group, 0)
        v = v.float().repeat_interleave(group, 0)
        if first is not None:
            visible[:, : int(first[r])] = False
        at = None if depths is None else total - n + depths[own]
        scores = masked_scores(
            q @ k.transpose(1, 2) * scale, visible, at, window, chunk, soft_cap, slopes, sinks
        )
        weights = scores.softmax(-1)[..., :total]
        output[row] = (weights @ v * value_scale).transpose(0, 1).to(output.dtype)


def latent_tree_attention_reference(
    query: torch.Tensor,
    latents: torch.Tensor,
    output: torch.Tensor,
    *,
    rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    ancestors: torch.Tensor,
    scale: float,
) -> None:
    """Writes the multi-head latent attention of all tree rows into ``output``, in float32.

    ``query`` [batch rows, heads, D] with the projections of the keys absorbed; ``latents``
    [pages, block_size, D], one row per token for all heads: keys are the rows, values their first V
    elements; ``output`` [batch rows, heads, V]; the rest as in
    :func:`packed_tree_attention_reference`.
    """
    for r, _, row, visible in _by_request(rows, query_start_loc, context_lens, ancestors):
        total = visible.shape[1]
        pages = block_table[r, : -(-total // latents.shape[1])].long()
        keys = latents[pages].flatten(0, 1)[:total].float()
        scores = query[row].transpose(0, 1).float() @ keys.T * scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        output[row] = (weights @ keys[:, : output.shape[-1]]).transpose(0, 1).to(output.dtype)


def move_slots_reference(
    kv_cache: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, layout: str
) -> None:
    """Copy KV slots ``src[i]`` -> ``dst[i]`` (int64 [n], flat slot numbers) of one layer."""
    _, heads, block_size, twice = kv_cache.shape
    flat = kv_cache.view(kv_cache.shape[0], heads, block_size * twice)
    for table in page_offsets(layout, block_size, twice // 2):
        moved = flat[
            (src // block_size)[:, None, None],
            torch.arange(heads)[None, :, None],
            table[src % block_size][:, None, :],
        ]
        flat[
            (dst // block_size)[:, None, None],
            torch.arange(heads)[None, :, None],
            table[dst % block_size][:, None, :],
        ] = moved
