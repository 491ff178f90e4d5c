"""One round of drafting: the levels of all trees, and what of them is verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_specplus.drafting.ends import Ends
from vllm_specplus.drafting.noise import DraftNoise
from vllm_specplus.drafting.shapes import Level, Shape, draft_distribution
from vllm_specplus.step import StepContext

Grow = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Adds a level to some of the trees; see ``TreeExecutor.grow``."""


@dataclass(slots=True)
class Knobs:
    """How the A drafting requests sample, on the draft's device."""

    greedy: torch.Tensor
    """bool [A]"""
    temperature: torch.Tensor
    """float32 [A]"""
    top_k: torch.Tensor | None
    """int64 [A]; None: nobody cuts."""
    top_p: torch.Tensor | None
    """float32 [A]; None: nobody cuts."""
    seeds: list[int | None]
    lengths: list[int]
    """Of the texts: a seeded request draws anew at every place of its text."""

    @classmethod
    def of(
        cls, step: StepContext, rows: np.ndarray, vocab_size: int, device: torch.device
    ) -> Knobs:
        def put(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values[rows]).to(device)

        sampling, lengths = step.sampling, step.num_tokens[rows].tolist()
        if sampling is None:
            cold = torch.zeros(len(rows), device=device)
            return cls(cold == 0, cold, None, None, [None] * len(rows), lengths)
        temperature = put(sampling.temperature)
        cuts_k, cuts_p = sampling.top_k[rows] < vocab_size, sampling.top_p[rows] < 1
        return cls(
            temperature == 0,
            temperature,
            put(sampling.top_k).long() if cuts_k.any() else None,
            put(sampling.top_p) if cuts_p.any() else None,
            [sampling.seeds[r] for r in rows],
            lengths,
        )

    def at(self, active: torch.Tensor) -> tuple:
        """Temperature, top_k and top_p of the requests ``active`` int64 [n]."""
        cuts = (None if cut is None else cut[active] for cut in (self.top_k, self.top_p))
        return (self.temperature[active], *cuts)


def grow_levels(
    shape: Shape, levels: Sequence[int], logits: torch.Tensor, knobs: Knobs, ends: Ends, grow: Grow,
    noise_of: DraftNoise,
) -> tuple[list[tuple[np.ndarray, Level]], list[torch.Tensor]]:  # fmt: skip
    """The levels of the round's trees, of ``levels`` nodes at most, from the ``logits`` [A, 1, V]
    at their roots on: which trees int64 [n] have each, and it; and what its nodes were drawn from,
    [n * w, V]."""
    # Which trees go on is known on the host: asking the device would wait for it.
    alive = np.arange(len(logits))
    active = torch.arange(len(logits), device=logits.device)
    grown: list[tuple[np.ndarray, Level]] = []
    draft_probs = []
    for depth in range(len(shape.sizes)):
        if depth:
            going_on = np.flatnonzero(ends.depths[alive] > depth)
            if not len(going_on):
                break
            keep = torch.from_numpy(going_on).to(logits.device)
            shape.select(keep)
            alive, active, level = alive[going_on], active[keep], grown[-1][1]
            read = shape.goes_on_from
            above = depth - 2 if read else sum(levels[: depth - 2])
            parents = level.parents[keep, :read] + (above if depth > 1 else -1)
            logits = grow(active, level.tokens[keep, :read], parents)
        q = draft_distribution(logits, *knobs.at(active))
        noise = noise_of.uniform(
            shape.noise_size(q.shape[1]),
            [knobs.seeds[r] for r in alive],
            [(knobs.lengths[r], depth) for r in alive],
        )
        grown.append((alive, shape.expand(q, noise)))
        draft_probs.append(q.flatten(0, 1))
        ends.look(depth, alive, grown[-1][1], q)
    return grown, draft_probs


def collect(
    grown: list[tuple[np.ndarray, Level]], probs_rows: list[int], kept: np.ndarray,
    counts: np.ndarray,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:  # fmt: skip
    """(tokens, parents, drawn_from, source) of each tree: of its nodes level by level, those
    ``kept`` bool [A, N], and of these the first ``counts``."""
    tokens, parents, drawn_from = np.zeros((3, *kept.shape), np.int32)
    drawn = [torch.stack((level.tokens, level.parents)).flatten(1) for _, level in grown]
    host = torch.cat(drawn, 1).cpu().numpy()  # one copy, for which the device is waited for
    first, above, probs_row, begin = 0, -1, 0, 0
    for (alive, level), rows in zip(grown, probs_rows, strict=True):
        width = level.tokens.shape[1]
        end = begin + len(alive) * width
        ids, places = host[:, begin:end].reshape(2, len(alive), width)
        here = slice(first, first + width)
        tokens[alive, here] = ids
        parents[alive, here] = places + above
        drawn_from[alive, here] = (
            probs_row + places + np.arange(len(alive))[:, None] * (rows // len(alive))
        )
        probs_row += rows
        above, first, begin = first, first + width, end
    trees = []
    for r, n in enumerate(counts.tolist()):
        here = np.flatnonzero(kept[r])[:n]
        number = np.append(np.cumsum(kept[r], dtype=np.int32) - 1, np.int32(-1))  # the root's
        trees.append((
            tokens[r, here], number[parents[r, here]], drawn_from[r, here],
            np.zeros(len(here), np.int32),
        ))  # fmt: skip
    return trees
