"""CUDA graphs of the passes over tree levels.

A level of a small draft is many short kernels, which take the host longer to launch than the
device to run. A graph launches them at once, on tensors that stay where they are: per size of
level one set, to which the inputs are copied. Numbers of requests are rounded up to powers of two;
how long the texts are is in the tensors. All are recorded at the start, none while serving.

Levels only: text comes in every length, and is read once.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from vllm_specplus.drafting.cache import PageStore
from vllm_specplus.drafting.passes import Rows

logger = logging.getLogger(__name__)

Pass = Callable[..., torch.Tensor]
Record = Callable[[Pass, tuple[torch.Tensor, ...]], tuple[Callable[[], None], torch.Tensor]]
"""``(run, inputs)`` -> a call that computes ``run(*inputs)`` of what is in these tensors by
then, into the tensor returned with it."""


class CudaRecorder:
    """The :data:`Record` of the current CUDA device."""

    def __init__(self) -> None:
        # Of all graphs: one runs at a time, and nobody needs what another left in between.
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run, inputs):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries set themselves up, which cannot be recorded
            run(*inputs)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(current),  # brings it back, also where a recording cannot be ended
            # Other threads of the worker may copy outputs meanwhile.
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            output = run(*inputs)
        return graph.replay, output


@dataclass(slots=True)
class _Recorded:
    inputs: tuple[torch.Tensor, ...]
    """Those of the rows, then the others."""
    replay: Callable[[], None]
    output: torch.Tensor


class LevelGraphs:
    """Calls ``run``, by a recorded graph where there is one.

    ``run(rows, *inputs)`` -> [T, d]: inputs [T, ...] of the :class:`Rows` of a level. What it
    returns is overwritten by the next call.
    """

    def __init__(self, run: Pass, record: Record, store: PageStore, max_nodes: int, max_pages: int):
        """``store``: what the rows are in; ``max_nodes``, ``max_pages``: of one request."""
        self._run, self._record, self._store = run, record, store
        self._max_nodes, self._max_pages = max_nodes, max_pages
        self._graphs: dict[tuple[int, int], _Recorded] = {}

    @torch.inference_mode()
    def record(
        self, widths: Iterable[int], max_requests: int, like: tuple[torch.Tensor, ...]
    ) -> None:
        """Record levels of ``widths`` nodes per request, of up to ``max_requests`` requests.

        ``like``: inputs of any number of rows.
        """
        sizes = [1 << power for power in range(_bits(max_requests) + 1)]
        # The largest first: the others find their memory in its pool.
        for requests, width in itertools.product(reversed(sizes), sorted(set(widths))):
            rows = self._empty(requests, width)
            inputs = tuple(each.new_zeros(requests * width, *each.shape[1:]) for each in like)
            run = functools.partial(self._run, rows)
            try:
                graph = _Recorded((*rows.tensors, *inputs), *self._record(run, inputs))
            except RuntimeError as error:
                logger.warning("tree levels are drafted without CUDA graphs: %s", error)
                return
            self._graphs[requests, width] = graph

    def forget(self) -> None:
        """Drop what is recorded: levels are run as they are until they are recorded again."""
        self._graphs.clear()

    def __call__(self, rows: Rows, *inputs: torch.Tensor) -> torch.Tensor:
        graph = self._graphs.get((1 << _bits(len(rows.contexts)), rows.most_rows))
        if graph is None or rows.table.shape[1] > self._max_pages:
            return self._run(rows, *inputs)
        for buffer, new in zip(graph.inputs, (*rows.tensors, *inputs), strict=True):
            buffer[tuple(slice(n) for n in new.shape)] = new
        # The other rows belong to no request, and write to page 0, which is nobody's.
        total = len(rows.positions)
        _, slots, starts, *_ = graph.inputs
        slots[total:] = 0
        starts[len(rows.starts) :] = total
        graph.replay()
        return graph.output[:total]

    def _empty(self, requests: int, width: int) -> Rows:
        """Rows of no text that see themselves only, in tensors of the most that there may be."""
        store, total = self._store, requests * width

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=store.device)

        starts = torch.arange(requests + 1, dtype=torch.int32, device=store.device) * width
        nodes = requests * self._max_nodes
        related = zeros(nodes) - 1
        if not store.packed:
            related = zeros(total, self._max_nodes, dtype=torch.bool)
            own = torch.arange(total, device=store.device)
            related[own, own % width] = True
        long = {"dtype": torch.int64}
        return Rows(
            zeros(total, **long), zeros(total, **long), starts, zeros(requests), zeros(requests),
            zeros(requests, self._max_pages), starts.clone(), zeros(nodes), related,
            width, self._max_pages * store.page,
        )  # fmt: skip


def _bits(n: int) -> int:
    """The power of the least power of two that is not less than ``n``."""
    return (n - 1).bit_length()
