"""Recorded levels compute what the pass itself does, whatever was in their tensors before.

Recording needs a GPU; ``record_on_cpu`` stands in for it. That whole drafts go through it
unharmed is tested in ``test_drafting.py`` and ``test_eagle.py``.
"""

from __future__ import annotations

import logging

import pytest
import torch

from vllm_specplus.drafting.cache import PageStore
from vllm_specplus.drafting.graphs import LevelGraphs
from vllm_specplus.drafting.passes import Rows

PAGE, MAX_NODES, MAX_PAGES = 4, 8, 6
CPU = torch.device("cpu")


def record_on_cpu(run, inputs):
    """What a CUDA graph does, as seen from outside: the same tensors, every time."""
    output = run(*inputs)

    def replay():
        with torch.inference_mode():
            output.copy_(run(*inputs))

    return replay, output


class Pass:
    """Stands in for a draft's layers: writes to slots, sums what its rows see."""

    def __init__(self):
        self.store = torch.zeros(100 * PAGE)
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, rows: Rows, values: torch.Tensor) -> torch.Tensor:
        self.sizes.append((len(rows.contexts), len(values)))
        self.store[rows.slots] = values
        out = torch.full((len(values), 1), torch.nan)  # rows of nobody are not computed
        for r, (context, end) in enumerate(zip(rows.contexts, rows.ends, strict=True)):
            keys = int(rows.key_starts[r + 1] - rows.key_starts[r])
            seen = self.store.view(-1, PAGE)[rows.table[r].long()].flatten()
            text, nodes = seen[: int(end)].sum(), seen[int(context) : int(context) + keys]
            for row in range(int(rows.starts[r]), int(rows.starts[r + 1])):
                out[row] = text + (rows.related[row, :keys] * nodes).sum()
        return out


def level(requests: int, width: int, pages: int, seed: int) -> tuple[Rows, torch.Tensor]:
    """The second level of trees, of requests that own their pages (page 0 is nobody's)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    table = 1 + torch.randperm(99, generator=generator)[: requests * pages].view(requests, pages)
    nodes = width + 1
    contexts = 1 + draw(pages * PAGE - nodes, requests)
    at = contexts[:, None] + torch.arange(1, nodes)
    slots = table.gather(1, at // PAGE) * PAGE + at % PAGE
    related = torch.zeros(requests * width, MAX_NODES, dtype=torch.bool)
    related[:, :nodes] = draw(2, requests * width, nodes) > 0
    each = torch.arange(requests + 1, dtype=torch.int32)
    rows = Rows(
        slots.flatten(), slots.flatten(), each * width, contexts, contexts - draw(2, requests),
        table.int(), each * nodes, draw(3, requests * nodes), related, width, pages * PAGE,
    )  # fmt: skip
    return rows, torch.rand(requests * width, generator=generator)


def graphs_of(run, record=record_on_cpu) -> LevelGraphs:
    store = PageStore([], 1, 16, 1, PAGE, torch.float32, CPU)
    return LevelGraphs(run, record, store, MAX_NODES, MAX_PAGES)


@pytest.mark.parametrize("seed", range(3))
def test_padding_leaves_no_trace(seed):
    plain, padded = Pass(), Pass()
    graphs = graphs_of(padded)
    graphs.record((2, 3), 5, (torch.zeros(1),))
    recorded = {(requests, requests * width) for requests in (1, 2, 4, 8) for width in (2, 3)}
    assert set(padded.sizes) == recorded
    sizes = [(r, w, p) for r in (1, 2, 3, 5) for w in (2, 3) for p in (2, 6)]
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    for step in [*order, *order[::-1]]:
        inputs = level(*sizes[step], 100 * seed + step)
        with torch.inference_mode():
            torch.testing.assert_close(graphs(*inputs), plain(*inputs))
        # Page 0 takes the padding.
        torch.testing.assert_close(padded.store[PAGE:], plain.store[PAGE:])
    assert set(padded.sizes) == recorded


def test_levels_that_were_not_recorded_run_as_they_are():
    """Of more requests, of another width, of longer texts; none is recorded while serving."""
    run, calls = Pass(), []
    graphs = graphs_of(run, lambda *args: calls.append(1) or record_on_cpu(*args))
    graphs.record((2,), 2, (torch.zeros(1),))
    assert len(calls) == 2
    for requests, width, pages in ((3, 2, 2), (2, 3, 2), (2, 2, MAX_PAGES + 1)):
        graphs(*level(requests, width, pages, 0))
        assert run.sizes[-1] == (requests, requests * width)
    assert len(calls) == 2


def test_a_device_that_cannot_record_drafts_without(caplog):
    def fails(run, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    run = Pass()
    graphs = graphs_of(run, fails)
    caplog.set_level(logging.WARNING)
    graphs.record((2, 3), 4, (torch.zeros(1),))
    for seed in range(2):
        inputs = level(3, 2, 2, seed)
        torch.testing.assert_close(graphs(*inputs), Pass()(*inputs))
    assert [record.getMessage() for record in caplog.records] == [
        "tree levels are drafted without CUDA graphs: "
        "operation not permitted when stream is capturing"
    ]
