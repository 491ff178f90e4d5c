"""Draws of seeded requests against vLLM's own last step, one token after another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.sampler import Sampler

from tests.engine.test_row_sampling import metadata_of
from tests.samplers.test_relaxed import VOCAB, make_rows, random_rows
from vllm_specplus.engine import row_seeds
from vllm_specplus.engine.row_sampling import sample_rows
from vllm_specplus.engine.row_seeds import RowSampler, SeededDraws
from vllm_specplus.step import Rows

WAYS = ["seeds", "noise", "noise in float64"]


def stock(way: str) -> Sampler:
    """vLLM's, as on the CPU or as elsewhere."""
    sampler = Sampler(use_fp64_gumbel=way == "noise in float64")
    last = sampler.topk_topp_sampler
    last.forward = last.forward_cpu if way == "seeds" else last.forward_native
    return sampler


def plain(
    way: str, seed: int, rows_of_logits: list[torch.Tensor]
) -> tuple[list[int], torch.Tensor]:
    """Tokens drawn one after another by a generator, and its state then."""
    generator = torch.Generator().manual_seed(seed)
    last, out = stock(way).topk_topp_sampler, []
    for logits in rows_of_logits:
        drawn, _ = last(logits[None].clone(), {0: generator}, None, None)
        out.append(int(drawn))
    return out, generator.get_state()


def path_rows(rows: Rows, row: int, first: int) -> list[int]:
    path = [row]
    while rows.parents[path[0]] >= 0:
        path.insert(0, first + int(rows.parents[path[0]]))
    return path


def differences(way: str, case: int) -> int:
    rng = np.random.default_rng(case)
    count = int(rng.integers(1, 5))
    rows = random_rows(rng, count)
    logits = torch.from_numpy(rng.normal(0, 2, (len(rows.tokens), VOCAB))).float()
    seeds = {r: int(rng.integers(100)) for r in range(count) if r == 0 or rng.random() < 0.7}
    generators = {r: torch.Generator().manual_seed(seed) for r, seed in seeds.items()}
    metadata = metadata_of([SamplingParams()] * count, [[]] * count, [0] * count, None)
    metadata.generators = generators
    got = sample_rows(RowSampler(stock(way)), logits.clone(), metadata, rows, None)
    wrong = 0
    for r, seed in seeds.items():
        first, end = rows.starts[r : r + 2].tolist()
        for row in range(first, end):
            want, _ = plain(way, seed, [logits[i] for i in path_rows(rows, row, first)])
            wrong += want[-1] != got.tokens[row]
    draws = np.array([rng.integers(0, rows.depths.max() + 2) for _ in range(count)])
    deepest = [int(rows.depths[a:b].max()) for a, b in itertools.pairwise(rows.starts)]
    draws = np.minimum(draws, np.array(deepest) + 1)
    got.seeded.advance(draws)
    for r, seed in seeds.items():
        _, state = plain(way, seed, [logits[0]] * int(draws[r]))
        wrong += not torch.equal(generators[r].get_state(), state)
    return wrong


@pytest.mark.parametrize("way", WAYS)
def test_as_one_token_after_another(way):
    assert sum(differences(way, case) for case in range(40)) == 0


@pytest.mark.parametrize("way", WAYS)
def test_the_comparison_would_notice(way, monkeypatch):
    """The control: a draw too many per request."""
    spans = SeededDraws._spans

    def late(self):
        for request, generator, first, depths in spans(self):
            torch.empty(1 if way == "seeds" else VOCAB).exponential_(generator=generator)
            yield request, generator, first, depths

    monkeypatch.setattr(row_seeds.SeededDraws, "_spans", late)
    assert sum(differences(way, case) for case in range(5)) > 0


class Launches(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def launches(way: str, branches: int) -> int:
    """Of a step with one seeded tree of depth 3 and so many branches."""
    parents = [-1, *(0 if i % 3 == 0 else i for i in range(3 * branches))]
    rows = make_rows([1] * len(parents), parents, [0, len(parents)])
    metadata = metadata_of([SamplingParams(seed=1, temperature=1.0)], [[]], [0], None)
    sampler = RowSampler(stock(way))
    with Launches() as counted:
        sample_rows(sampler, torch.zeros(len(parents), VOCAB), metadata, rows, None)
    return counted.count


@pytest.mark.parametrize("way", WAYS)
def test_launches_go_by_depth_and_not_by_row(way):
    assert launches(way, 2) == launches(way, 20)
