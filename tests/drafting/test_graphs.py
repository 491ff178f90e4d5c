"""Recorded levels compute what the pass itself does, whatever was in their tensors before.

Recording needs a GPU; ``record_on_cpu`` stands in for it. That whole drafts go through it
unharmed is tested in ``test_drafting.py`` and ``test_eagle.py``.
"""

from __future__ import annotations

import logging

import pytest
import torch

from vllm_specplus.drafting.graphs import MOST_SLOTS, LevelGraphs

PAGE = 4


def record_on_cpu(run, inputs):
    """What a CUDA graph does, as seen from outside: the same tensors, every time."""
    output = run(*inputs)

    def replay():
        with torch.inference_mode():
            output.copy_(run(*inputs))

    return replay, output


class Pass:
    """Stands in for a draft's layers: writes to slots, sums what its rows may see."""

    def __init__(self, slots: int):
        self.store = torch.zeros(slots)
        self.sizes: list[tuple[int, ...]] = []

    def __call__(self, values, slots, table, mask):
        self.sizes.append((*values.shape[:2], table.shape[1]))
        self.store[slots.reshape(-1)] = values.reshape(-1)
        seen = self.store.view(-1, PAGE)[table].flatten(1)
        assert bool(mask.any(-1).all()), "softmax over nothing"
        return (mask * seen[:, None]).sum(-1, keepdim=True)


def level(requests: int, width: int, pages: int, seed: int):
    """Random inputs of a level, of requests that own their pages (page 0 is nobody's)."""
    generator = torch.Generator().manual_seed(seed)
    table = 1 + torch.randperm(99, generator=generator)[: requests * pages].view(requests, pages)
    at = torch.stack(
        [torch.randperm(pages * PAGE, generator=generator)[:width] for _ in range(requests)]
    )
    slots = table.gather(1, at // PAGE) * PAGE + at % PAGE
    mask = torch.rand(requests, width, pages * PAGE, generator=generator) < 0.5
    mask |= torch.zeros_like(mask).scatter_(2, at[..., None], True)
    return torch.rand(requests, width, generator=generator), slots, table, mask


@pytest.mark.parametrize("seed", range(3))
def test_padding_leaves_no_trace(seed):
    plain, padded = Pass(100 * PAGE), Pass(100 * PAGE)
    graphs = LevelGraphs(padded, PAGE, record_on_cpu)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()
    sizes = [(requests, pages) for requests in (1, 2, 3, 5) for pages in (1, 3, 6)]
    for step in [*order, *order[::-1]]:
        requests, pages = sizes[step]
        inputs = level(requests, 3, pages, 100 * seed + step)
        with torch.inference_mode():
            torch.testing.assert_close(graphs(*inputs), plain(*inputs))
        # Page 0 takes the padding.
        torch.testing.assert_close(padded.store[PAGE:], plain.store[PAGE:])
    rounded = {(requests, 3, pages) for requests in (1, 2, 4, 8) for pages in (1, 4, 8)}
    assert set(padded.sizes) == rounded


def test_large_levels_run_as_they_are():
    run, recorded = Pass(4 * PAGE), []
    graphs = LevelGraphs(run, PAGE, lambda *args: recorded.append(1) or record_on_cpu(*args))
    pages = MOST_SLOTS // PAGE
    for count, recordings in ((pages, 1), (pages + 1, 1)):
        table = torch.ones(1, count, dtype=torch.int64)
        mask = torch.ones(1, 1, count * PAGE, dtype=torch.bool)
        graphs(torch.ones(1, 1), torch.full((1, 1), PAGE), table, mask)
        assert len(recorded) == recordings
    assert run.sizes[-1] == (1, 1, pages + 1)


def test_a_device_that_cannot_record_drafts_without(caplog):
    def fails(run, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    run = Pass(100 * PAGE)
    graphs = LevelGraphs(run, PAGE, fails)
    caplog.set_level(logging.WARNING)
    for seed in range(2):
        inputs = level(3, 2, 2, seed)
        torch.testing.assert_close(graphs(*inputs), Pass(100 * PAGE)(*inputs))
    assert [record.getMessage() for record in caplog.records] == [
        "tree levels are drafted without CUDA graphs: "
        "operation not permitted when stream is capturing"
    ]
