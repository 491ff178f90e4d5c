"""Where the trees of a round end: behind the levels that were planned, or before."""

from __future__ import annotations

import numpy as np
import torch

from vllm_specplus.drafting.shapes import Level, Shape, caterpillar_widths
from vllm_specplus.drafting.stopping import Stop


class Ends:
    """Of R requests. What a stop or a caterpillar decides on the way, it is asked on the host, so
    that the device is waited for at every level; without either, at none."""

    def __init__(
        self, depths: np.ndarray, nodes: np.ndarray, shape: Shape, greedy: np.ndarray,
        stop: Stop | None, requests: list[str],
    ):  # fmt: skip
        """``depths`` int64 [R] levels planned and ``nodes`` int32 [R] nodes in all; ``greedy`` bool
        [R]."""
        self.depths = depths.copy()
        """Int64 [R] levels that each tree has; of one that grows, at most."""
        self._room, self._greedy, self._stop = nodes.astype(np.int64), greedy, stop
        self._leaves = shape.goes_on_from is not None
        if stop is not None:
            stop.begin(requests, depths)

    def look(self, depth: int, alive: np.ndarray, level: Level, q: torch.Tensor) -> None:
        """Decide which trees ``alive`` int64 [A] go on behind the ``level`` of ``depth``, drawn
        from ``q`` float32 [A, w, V], and how much of it they keep."""
        if self._stop is None and not self._leaves:
            return
        first = q[:, 0].gather(1, level.tokens[:, :1])[:, 0]
        confidence = first.cpu().numpy()
        on = np.ones(len(alive), bool)
        if self._leaves:
            widths = caterpillar_widths(confidence, self._greedy[alive])
            widths = np.minimum(widths, level.tokens.shape[1])
            level.kept = np.minimum(widths, self._room[alive])
            self._room[alive] -= level.kept
            on &= self._room[alive] > 0
        if self._stop is not None:
            on &= self._stop.goes_on(depth, alive, confidence)
        self.depths[alive[~on]] = depth + 1

    def kept(self, grown: list[tuple[np.ndarray, Level]]) -> np.ndarray:
        """Bool [R, N]: which of the nodes of all levels ``grown`` (trees int64 [A], level) stay."""
        parts = []
        for depth, (alive, level) in enumerate(grown):
            width = level.tokens.shape[1]
            here = np.zeros((len(self.depths), width), bool)
            most = np.full(len(alive), width) if level.kept is None else level.kept
            here[alive] = np.arange(width) < most[:, None]
            here[self.depths <= depth] = False
            parts.append(here)
        return np.concatenate(parts, 1)
