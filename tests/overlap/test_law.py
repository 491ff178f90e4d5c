"""Sampled text of a target whose draft goes on: its law is the target's, exactly."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.overlap.toy import Alone, V, law, toy
from vllm_specplus.overlap.messages import Message, from_bytes
from vllm_specplus.samplers.registry import rule_class
from vllm_specplus.step import DraftProbs, Rows, Sampling, StepContext, bare_step
from vllm_specplus.testing.distribution import chi_square
from vllm_specplus.tree import accepted_paths, row_depths

pytest.importorskip("scipy")
pytestmark = pytest.mark.slow
PROMPT, TOKENS, REQUESTS, BATCHES = (1, 2), 3, 400, 8
#: A target and a draft that resembles it, so that outcomes are foreseen.
TARGET = law(0)
DRAFT = 0.6 * law(0) + 0.4 * law(1)
DRAFT /= DRAFT.sum(-1, keepdims=True)


def joint() -> dict[tuple[int, ...], float]:
    """The target's law of three tokens."""
    found = {}
    for tokens in itertools.product(range(V), repeat=TOKENS):
        text, probability = list(PROMPT), 1.0
        for token in tokens:
            probability *= float(TARGET[text[-2], text[-1], token])
            text.append(token)
        found[tokens] = probability
    return found


def as_rows(step: StepContext, answer: Message) -> tuple[Rows, DraftProbs]:
    """The trees of an answer as a step verifies them."""
    arrays, counts = answer.arrays, answer.arrays["counts"]
    starts = np.concatenate(([0], np.cumsum(counts + 1))).astype(np.int32)
    tokens, parents = np.zeros((2, int(starts[-1])), np.int32)
    index, drawn = np.full(len(tokens), -1, np.int32), np.zeros(len(tokens), np.int32)
    begin = 0
    for r, count in enumerate(counts.tolist()):
        first, own = int(starts[r]), slice(begin, begin + count)
        tokens[first] = step.token_ids[r, step.num_tokens[r] - 1]
        tokens[first + 1 : first + 1 + count] = arrays["tokens"][own]
        parents[first] = -1
        parents[first + 1 : first + 1 + count] = above = arrays["parents"][own] + 1
        if "drawn_from" in arrays:
            rows, is_drawn = arrays["drawn_from"][own], arrays["drawn_from"][own] >= 0
            index[first + above[is_drawn]] = rows[is_drawn]
            np.add.at(drawn, first + above[is_drawn], 1)
        begin += count
    q = torch.zeros(1, V)
    if "q" in arrays:
        q = from_bytes(arrays["q"], torch.float32, torch.device("cpu"))
    return Rows(tokens, parents, starts, row_depths(parents, starts)), DraftProbs(q, index, drawn)


def target_probs(step: StepContext, rows: Rows) -> torch.Tensor:
    """The target's law behind every row."""
    before = np.zeros(len(rows.tokens), np.int64)
    for r, (first, end) in enumerate(itertools.pairwise(rows.starts.tolist())):
        before[first] = step.token_ids[r, step.num_tokens[r] - 2]
        before[first + 1 : end] = rows.tokens[first + rows.parents[first + 1 : end]]
    return torch.from_numpy(TARGET[before, rows.tokens])


def used_uniform(seed: int, length: int) -> float:
    """The first uniform by which the trees behind a text of ``length`` tokens are drawn."""
    own = torch.Generator().manual_seed(hash((seed, length, 0)) % 2**63)
    return float(torch.empty(1, dtype=torch.float64).uniform_(generator=own))


def sample(process: Alone, rule: str, batch: int, fresh: bool) -> tuple[list, int]:
    """Texts of three tokens, and how many steps were foreseen. Verdicts are by uniforms of their
    own or, which is wrong, by those that the drafts were drawn by."""
    judge, draws = rule_class(rule)(), torch.Generator().manual_seed(1000 + batch)
    texts = [list(PROMPT) for _ in range(REQUESTS)]
    seeds = [1 + batch * REQUESTS + r for r in range(REQUESTS)]
    foreseen = 0
    while any(len(text) < len(PROMPT) + TOKENS for text in texts):
        lengths = np.array([len(text) for text in texts], np.int32)
        tokens = np.zeros((REQUESTS, int(lengths.max())), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = text
        going_on = lengths < len(PROMPT) + TOKENS
        sampling = Sampling(
            np.ones(REQUESTS, np.float32), np.full(REQUESTS, V, np.int32),
            np.ones(REQUESTS, np.float32), seeds,
        )  # fmt: skip
        step = replace(
            bare_step((), tokens, 0), num_tokens=lengths, sampling=sampling, acceptance=None,
            max_nodes=np.where(going_on, sum(process.drafter.levels), 0).astype(np.int32),
            versions=np.array(seeds),
        )  # fmt: skip
        # In every other batch steps wait only where more than half were not foreseen.
        price = REQUESTS / 2 if fresh and batch % 2 else -1.0
        answer = process.ask(step, price=price)
        foreseen += int((answer.arrays["foreseen"] & going_on).sum())
        rows, probs = as_rows(step, answer)
        accept = torch.rand(len(rows.tokens), dtype=torch.float64, generator=draws)
        if not fresh:
            for r, first in enumerate(rows.starts[:-1].tolist()):
                if rows.starts[r + 1] > first + 1:
                    accept[first + 1] = used_uniform(seeds[r], int(lengths[r]))
        output = torch.rand(REQUESTS, dtype=torch.float64, generator=draws)
        sampled = judge.verify(target_probs(step, rows), rows, probs, accept, output).numpy()
        path, depth = accepted_paths(rows.tokens, rows.parents, rows.starts, sampled)
        for r in np.flatnonzero(going_on):
            own = rows.starts[r] + path[r, : depth[r]]
            texts[r] += sampled[own].tolist()
    return [tuple(text[2 : 2 + TOKENS]) for text in texts], foreseen


def observed(shape: dict, rule: str, fresh: bool = True) -> tuple[float, int]:
    """The p-value of many texts, and how many steps were foreseen."""
    texts, foreseen = [], 0
    for batch in range(BATCHES):
        more, came = sample(toy(DRAFT, **shape), rule, batch, fresh)
        texts += more
        foreseen += came
    return chi_square(joint(), texts), foreseen


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ({"shape": "chain", "num_speculative_tokens": 2}, "block"),
        ({"shape": "rsd_s", "width": 2, "num_speculative_tokens": 4}, "traversal"),
        (
            {"shape": "chain", "num_speculative_tokens": 2, "overlap": "paper"},
            "without_replacement",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value["shape"],
)
def test_sampled_text_has_the_targets_law(shape, rule):
    """Trees that were drafted ahead, behind the text, and none at all, in one batch."""
    p_value, foreseen = observed(shape, rule)
    assert p_value > 1e-3
    assert foreseen > BATCHES * REQUESTS / 32  # most first steps end their texts


def test_uniforms_that_are_used_twice_are_seen():
    """The reference code's mistake: a verdict by the number that the token was drawn by."""
    p_value, _ = observed(
        {"shape": "chain", "num_speculative_tokens": 2}, "without_replacement", fresh=False
    )
    assert p_value < 1e-6
