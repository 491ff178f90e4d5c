"""What a step costs does not depend on how long the texts are; the figures in the docs are those
that were measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_specplus.drafting.cache import PagedCache

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import step_counts
from step_counts import COUNTS, LENGTHS, PARTS, REQUESTS, ROOT, Batch, measure, table

DOCUMENT = json.loads((ROOT / "benchmarks/results/step_counts.json").read_text())
EXACT = ("launches", "copies", "bytes", "calls")

CACHE = "draft: cache of a draft model"
#: At most, per step of one request and of 64: launches, copies, calls.
BOUNDS = {
    "draft: token_recycling": ((0, 0, 30), (0, 0, 300)),
    CACHE: ((0, 0, 30), (0, 0, 1200)),
    "inputs of a tree step": ((0, 1, 60), (0, 1, 400)),
    "verify, sampled": ((8, 2, 60), (8, 2, 60)),
    "verify, penalties": ((32, 2, 110), (32, 2, 430)),
    "verify, seeded": ((12, 2, 90), (140, 2, 750)),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_counts_are_bounded_at_any_length(part):
    for requests, bound in zip(REQUESTS, BOUNDS[part], strict=True):
        short = measure(part, requests, LENGTHS[0])
        for name, most in zip(("launches", "copies", "calls"), bound, strict=True):
            assert short[name] <= most, name
    short, long = measure(part, 1, LENGTHS[0]), measure(part, 1, LENGTHS[-1])
    assert [long[name] for name in EXACT] == [short[name] for name in EXACT]
    assert long["allocated"] <= most_allocated(part, short)


def most_allocated(part: str, short: dict[str, float]) -> float:
    """Of a long text, by what was allocated for a short one."""
    # A draft's table of pages has 8 bytes for 16 tokens of a text.
    table_of_pages = LENGTHS[-1] // 2 if part == CACHE else 0
    return 1.2 * short["allocated"] + table_of_pages


@pytest.mark.slow
def test_a_text_that_is_compared_is_noticed(monkeypatch):
    """The control: without versions, what is allocated goes by the length of the text."""
    stock = PagedCache.cached
    monkeypatch.setattr(PagedCache, "cached", lambda self, name, text, *_: stock(self, name, text))
    # The number of arguments says whether versions are known.
    short, long = measure(CACHE, 1, LENGTHS[0]), measure(CACHE, 1, LENGTHS[-1])
    assert long["allocated"] > most_allocated(CACHE, short)


def test_every_launch_and_copy_is_counted():
    into = step_counts.Counter()
    with step_counts.copies(into), step_counts.Launches(into):
        sent = torch.from_numpy(np.zeros(10, np.int32))
        (sent[:5] + 1).cpu()
    assert into == {"copies": 2, "bytes": 40 + 20, "launches": 1}


def test_texts_gain_tokens():
    batch = Batch(2, 1024)
    assert (batch.known(3) - batch.known(0)).tolist() == [6, 6]


def test_the_docs_show_what_was_measured():
    assert table(DOCUMENT) in (ROOT / "docs/step_cost.md").read_text()
    assert list(DOCUMENT["now"]) == list(PARTS)
    assert DOCUMENT["setting"]["before"]


def test_what_was_measured_does_not_depend_on_the_length():
    for part, cases in DOCUMENT["now"].items():
        for requests in REQUESTS:
            counts = [cases[f"{requests} x {n // 1024}k"] for n in LENGTHS]
            assert len({tuple(each[name] for name in EXACT) for each in counts}) == 1, part
            assert set(counts[0]) == set(COUNTS)
