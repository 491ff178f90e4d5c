"""CUDA graphs of the passes over tree levels.

A level of a small draft is many short kernels, which take the host longer to launch than the
device to run. A graph launches them at once, on tensors that stay where they are: per size of
level one set, to which the inputs are copied. Sizes are rounded up to powers of two, and
recorded when they first occur.

Levels only: text comes in every length, and is read once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

Pass = Callable[..., torch.Tensor]
Record = Callable[[Pass, tuple[torch.Tensor, ...]], tuple[Callable[[], None], torch.Tensor]]
"""``(run, inputs)`` -> a call that computes ``run(*inputs)`` of what is in these tensors by
then, into the tensor returned with it."""

#: Slots that a pass may read, over all requests. Beyond, attention takes the device longer than
#: launches take the host, and the gathered keys of every size would be kept.
MOST_SLOTS = 1 << 16


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
    replay: Callable[[], None]
    output: torch.Tensor


class LevelGraphs:
    """Calls ``run``, by a recorded graph where there is room for one.

    ``run(*rows, slots, table, mask)`` -> [R, w, d]: any tensors [R, w, ...], then as in
    ``DraftExecutor._layers``. What it returns is overwritten by the next call.
    """

    def __init__(self, run: Pass, page: int, record: Record):
        """``page``: slots per page."""
        self._run, self._page, self._record = run, page, record
        self._graphs: dict[tuple[int, ...], _Recorded] = {}
        self._works = True

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        *_, table, mask = inputs
        requests, width = mask.shape[:2]
        size = _power_of_two(requests), width, _power_of_two(table.shape[1])
        if not self._works or size[0] * size[2] * self._page > MOST_SLOTS:
            return self._run(*inputs)
        graph = self._graphs.get(size)
        static = self._tensors(size, inputs) if graph is None else graph.inputs
        for buffer, new in zip(static, inputs, strict=True):
            buffer.zero_()  # padding writes to page 0
            buffer[tuple(slice(n) for n in new.shape)] = new
        static[-1][requests:, :, 0] = True  # it has to see something
        if graph is None:
            try:
                graph = _Recorded(static, *self._record(self._run, static))
            except RuntimeError as error:
                self._works = False
                logger.warning("tree levels are drafted without CUDA graphs: %s", error)
                return self._run(*inputs)
            self._graphs[size] = graph
        graph.replay()
        return graph.output[:requests]

    def _tensors(
        self, size: tuple[int, int, int], inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        requests, width, pages = size
        *rows, table, mask = inputs
        return (
            *(each.new_empty(requests, width, *each.shape[2:]) for each in rows),
            table.new_empty(requests, pages),
            mask.new_empty(requests, width, pages * self._page),
        )


def _power_of_two(n: int) -> int:
    """The least one that is not less than ``n``."""
    return 1 << (n - 1).bit_length()
