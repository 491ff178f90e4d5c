"""Copying slots of a paged KV cache on a GPU: all layers, KV heads and requests in one launch.

The layers may differ in data type, KV heads, head size and strides. All that a copy has to know of
them is a table of *strips*, one for each KV head of each layer: a strip is that head's keys and
values of all slots. Bytes are copied, in words of four.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

#: Bytes of what is copied at a time.
WORD = 4
#: Slots that a program holds in registers.
ROWS = 8


def strips(caches: Sequence[torch.Tensor]) -> np.ndarray:
    """Describe every KV head of ``caches`` [pages, kv_heads, block_size, 2 * head_dim].

    Returns int64 [heads of all layers, 4]: address, bytes from page to page, bytes from token to
    token, words of a token. Raises ValueError if one cannot be copied word by word.
    """
    table = []
    for cache in caches:
        page, head, token, element = (stride * cache.element_size() for stride in cache.stride())
        length = cache.shape[3] * cache.element_size()
        if element != cache.element_size() or any(
            size % WORD for size in (cache.data_ptr(), page, head, token, length)
        ):
            raise ValueError(
                f"vllm-specplus cannot move the slots of a KV cache of shape "
                f"{tuple(cache.shape)}, strides {cache.stride()} and {cache.dtype}: the keys and "
                f"values of a token and head must be consecutive and aligned to {WORD} bytes"
            )
        for h in range(cache.shape[1]):
            table.append((cache.data_ptr() + h * head, page, token, length // WORD))
    return np.array(table, np.int64).reshape(-1, 4)


def runs(src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    """Divide moves into runs that do not touch each other's slots, as finely as their order allows.

    ``src`` and ``dst`` int64 [n]; returns int64 [runs + 1], the first move of each run and n.
    Raises ValueError if a slot is a source after it was a destination: no order within a run would
    then read it in time.
    """
    order = np.argsort(src, kind="stable")
    found = np.minimum(np.searchsorted(src[order], dst), len(src) - 1)
    reader = order[found]
    writer = np.flatnonzero(src[reader] == dst)
    reader = reader[writer]
    if (reader > writer).any():
        raise ValueError("KV slots are moved in an order that overwrites one before it is read")
    # Between a slot's reader and its writer no run may end.
    joined = np.zeros(len(src) + 1, np.int64)
    np.add.at(joined, reader + 1, 1)
    np.add.at(joined, writer + 1, -1)
    begins = np.flatnonzero(np.cumsum(joined[:-1]) == 0)
    return np.append(begins, len(src))


# Counts that change from step to step must not select another compiled variant.
@triton.jit(do_not_specialize=["num_moves", "block_size"])
def _move_slots_kernel(
    table,  # int64 [strips, 4], see strips()
    moves,  # int64 [2 * num_moves + runs + 1]: sources, destinations, begins of the runs
    num_moves,
    block_size,
    ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """Make the moves of one run in one strip.

    Every program copies whole tokens of its own strip and run, which no other program touches. It
    reads ``ROWS`` sources before it writes them, and in a longer run no source comes after it was
    a destination (:func:`runs`): what a later round reads was not written before.
    """
    strip = table + tl.program_id(0).to(tl.int64) * 4
    cache = tl.load(strip).to(tl.pointer_type(tl.int8))
    page_bytes = tl.load(strip + 1)
    token_bytes = tl.load(strip + 2)
    words = tl.arange(0, BLOCK_WORDS)
    word_valid = words < tl.load(strip + 3)
    begins = moves + 2 * num_moves + tl.program_id(1)
    end = tl.load(begins + 1)

    for first in range(tl.load(begins), end, ROWS):
        row = first + tl.arange(0, ROWS)
        valid = row < end
        src = tl.load(moves + row, mask=valid, other=0)
        dst = tl.load(moves + num_moves + row, mask=valid, other=0)
        src_bytes = src // block_size * page_bytes + src % block_size * token_bytes
        dst_bytes = dst // block_size * page_bytes + dst % block_size * token_bytes
        mask = valid[:, None] & word_valid[None, :]
        source = (cache + src_bytes).to(tl.pointer_type(tl.int32))
        content = tl.load(source[:, None] + words[None, :], mask=mask)
        # Another thread may write what this one reads: not before all have read.
        tl.debug_barrier()
        target = (cache + dst_bytes).to(tl.pointer_type(tl.int32))
        tl.store(target[:, None] + words[None, :], content, mask=mask)


def block_words(table: np.ndarray) -> int:
    """Return ``BLOCK_WORDS`` for a table of :func:`strips`."""
    return triton.next_power_of_2(int(table[:, 3].max()))


def move_slots(
    table: torch.Tensor, moves: torch.Tensor, num_moves: int, block_size: int, words: int
) -> None:
    """Copy slots in all strips, in one launch.

    ``table`` int64 [strips, 4] of :func:`strips` and ``moves`` int64 [2 * num_moves + runs + 1]
    (sources, destinations, :func:`runs`) are on the device; ``words`` is :func:`block_words`.
    """
    num_runs = moves.shape[0] - 2 * num_moves - 1
    _move_slots_kernel[(table.shape[0], num_runs)](
        table, moves, num_moves, block_size, ROWS=ROWS, BLOCK_WORDS=words
    )


def move_slots_reference(cache: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy slots ``src`` to ``dst``, int64 [n] on its device, of one layer's cache [pages,
    kv_heads, block_size, 2 * head_dim]: the definition, which reads everything first."""
    block_size = cache.shape[2]
    slots = cache.transpose(1, 2)
    moved = slots[src // block_size, src % block_size]
    slots[dst // block_size, dst % block_size] = moved
