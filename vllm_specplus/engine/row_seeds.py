"""The draws of seeded requests, one per depth of a tree.

In plain decoding a seeded request draws once per token from its own generator. All rows of one
depth share that draw, since only one of them is ever visited: a request draws as often as its tree
is deep, and its generator advances by the tokens that were output.

What vLLM draws per token differs by device. On the CPU it is a seed of 31 bits, from which a kernel
makes a row's noise: the seeds of all depths come of one call. Elsewhere it is a row of noise, and a
call per depth: a call that filled several rows would give other numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from vllm.v1.sample.ops.topk_topp_sampler import (
    TopKTopPSampler,
    apply_top_k_top_p,
    empty_exponential_noise_like,
    sample_with_exponential_noise,
)
from vllm.v1.sample.sampler import Sampler

from vllm_specplus.step import Rows


def _seeds(count: int, generator: torch.Generator | None) -> torch.Tensor:
    """int64 [count] as vLLM draws them on the CPU, one after another."""
    return torch.randint(0, 2**31, (count,), generator=generator, dtype=torch.long)


class SeededDraws:
    """What the seeded requests of a step draw. Their generators stay as they are until
    :meth:`advance`."""

    def __init__(self, generators: Mapping[int, torch.Generator], rows: Rows):
        self._generators, self._rows = generators, rows
        # Request -> states of its generator after 0, 1, 2, ... draws, where they are rows of noise.
        self._states: dict[int, list[torch.Tensor]] = {}

    def _spans(self):
        """(request, a generator to draw from, first row, depths int32 [n] of its rows)."""
        starts, depths = self._rows.starts, self._rows.depths
        for request, generator in self._generators.items():
            first, end = starts[request : request + 2].tolist()
            yield request, generator.clone_state(), first, depths[first:end]

    def seeds(self) -> torch.Tensor:
        """int64 [L] the seed of every row, of requests without a generator drawn for each."""
        out = _seeds(len(self._rows.tokens), None)
        seeds = out.numpy()
        for _, scout, first, depths in self._spans():
            own = _seeds(int(depths.max()) + 1, scout).numpy()
            seeds[first : first + len(depths)] = own[depths]
        return out

    def noise(self, probs: torch.Tensor, float64: bool) -> torch.Tensor:
        """[L, V] exponential noise for every row of ``probs`` float32 [L, V]."""
        noise = empty_exponential_noise_like(probs, float64)
        if len(self._generators) < len(self._rows.starts) - 1:
            noise.exponential_()
        rows, drawn = [], []
        for request, scout, first, depths in self._spans():
            states = self._states[request] = [scout.get_state()]
            # The first row of each depth takes the draw, and the others copy it.
            heads = np.unique(depths, return_index=True)[1] + first
            for head in heads.tolist():
                noise[head].exponential_(generator=scout)
                states.append(scout.get_state())
            rows.append(np.arange(first, first + len(depths)))
            drawn.append(heads[depths])
        into, of = np.concatenate(rows), np.concatenate(drawn)
        others = into != of
        if others.any():
            at = torch.from_numpy(np.stack((into, of))[:, others]).to(noise.device)
            noise[at[0]] = noise[at[1]]
        return noise

    def advance(self, draws: np.ndarray) -> None:
        """Leaves every generator as if it had made ``draws`` [R] draws in this step."""
        for request, generator in self._generators.items():
            count = int(draws[request])
            if request in self._states:
                generator.set_state(self._states[request][count])
            elif count:
                _seeds(count, generator)


class _SeededTopKTopP(nn.Module):
    """The last step of vLLM's sampler; for a step with ``draws`` in a way of its own."""

    def __init__(self, stock: TopKTopPSampler):
        super().__init__()
        self._stock = stock
        self._by_seeds = stock.forward == stock.forward_cpu and not stock.use_fp64_gumbel
        self.draws: SeededDraws | None = None

    def forward(self, logits, generators, k, p):
        if self.draws is None:
            return self._stock(logits, generators, k, p)
        logits = apply_top_k_top_p(logits, k, p)
        processed = processed_logprobs(logits, self._stock.logprobs_mode)
        if self._by_seeds:
            seeds = self.draws.seeds()
            return torch.ops._C.fused_gumbel_argmax(logits.to(torch.float32), seeds), processed
        probs = logits.softmax(-1, dtype=torch.float32)
        noise = self.draws.noise(probs, self._stock.use_fp64_gumbel)
        return sample_with_exponential_noise(probs, noise), processed


def processed_logprobs(logits: torch.Tensor, mode: str) -> torch.Tensor | None:
    """What vLLM reports of ``logits`` [L, V] behind top-k and top-p, in the modes that do."""
    if mode == "processed_logits":
        return logits
    if mode == "processed_logprobs":
        return logits.log_softmax(-1, dtype=torch.float32)
    return None


class RowSampler(Sampler):
    """vLLM's sampler, for rows."""

    def __init__(self, stock: Sampler):
        super().__init__(stock.logprobs_mode, stock.use_fp64_gumbel)
        self.topk_topp_sampler = self._last = _SeededTopKTopP(stock.topk_topp_sampler)

    def sample_rows(self, logits: torch.Tensor, metadata, draws: SeededDraws | None):
        """Samples a token for every row of ``logits`` [L, V] by ``metadata`` of as many entries,
        seeded requests by ``draws``."""
        self._last.draws = draws
        try:
            return self(logits=logits, sampling_metadata=metadata)
        finally:
            self._last.draws = None
