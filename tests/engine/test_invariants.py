"""The invariants of speculation in batches (arXiv 2510.22876), in a paged cache without an engine.

A cache of our own holds, for every slot, what a real one would: the position and all text that the
key and value of its token were computed from. Steps are described, accepted and compacted by the
engine's functions; requests come and go, and accept another number of tokens each. The cache is
looked at after every step. Each failure that the paper names is planted, and has to be found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np
import pytest

from vllm_specplus.engine.batch import (
    BatchView,
    cache_slots,
    describe,
    kept_rows,
    logits_rows,
    position_shifts,
)
from vllm_specplus.samplers import lossless
from vllm_specplus.tree import DraftTokens

VOCAB, PAGE, LONGEST = 50, 4, 96
#: What a token's key and value were computed from: its position, and the text up to it.
Seen = tuple[int, tuple[int, ...]]


def target(seen: Seen) -> int:
    """The greedy token behind what a row has seen."""
    return crc32(repr(seen).encode()) % VOCAB


def plain(text: list[int], count: int) -> list[int]:
    """Greedy decoding, one token after another."""
    text = list(text)
    for _ in range(count):
        text.append(target((len(text) - 1, tuple(text))))
    return text


@dataclass
class Request:
    text: list[int]
    goal: list[int]
    """The text that plain decoding ends with."""
    pages: np.ndarray
    computed: int = 0
    """Tokens whose keys and values are in the cache."""


@dataclass
class Engine:
    """As much of one as the invariants are about."""

    draft: Callable[[Request], tuple[list[int], list[int]]]
    """Tokens and parents (-1: the root)."""
    broken: str | None = None
    """The failure that is planted."""
    cache: dict[int, Seen] = field(default_factory=dict)
    free: list[int] = field(default_factory=lambda: list(range(400)))

    def add(self, prompt: list[int], count: int) -> Request:
        pages, self.free = self.free[: LONGEST // PAGE], self.free[LONGEST // PAGE :]
        return Request(list(prompt), plain(prompt, count), np.array(pages, np.int32))

    def slot(self, request: Request, position: int) -> int:
        at = np.zeros(1, np.int64)
        return int(cache_slots(request.pages[None], PAGE, at, at + position)[0])

    def step(self, batch: list[Request]) -> list[int]:
        """Returns how many drafted tokens each request has accepted."""
        view = self.view(batch)
        counts = np.array([len(each) for each in view.drafts])
        rows = logits_rows(counts, np.cumsum(view.num_scheduled))
        step = describe(view, rows, serves_chains=True)
        seen, slots = self.forward(batch, view, step)
        sampled = np.array([target(seen[row]) for row in rows], np.int32)
        step.acceptance = lossless.accept(step.rows, sampled)
        kept, positions, starts = kept_rows(step)
        for r, request in enumerate(batch):
            own = slice(starts[r], starts[r + 1])
            moved = [self.cache[slots[row]] for row in kept[own]]
            for position, value in zip(positions[own].tolist(), moved, strict=True):
                if self.broken != "rejected tokens stay in the cache":
                    self.cache[self.slot(request, position)] = value
            output = step.acceptance.output[r, : step.acceptance.lengths[r]].tolist()
            request.text += output[: len(request.goal) - len(request.text)]
            request.computed = len(request.text) - 1
            if self.broken == "the bonus token counts as cached":
                request.computed += 1
            if self.broken == "rejected tokens count as text":
                request.computed = int(view.num_computed[r] + view.num_scheduled[r])
        return (step.acceptance.lengths - 1).tolist()

    def view(self, batch: list[Request]) -> BatchView:
        drafts: list[list[int]] = []
        scheduled, inputs = [], []
        texts = np.zeros((len(batch), LONGEST), np.int32)
        for r, request in enumerate(batch):
            reading = request.computed < len(request.text) - 1
            tokens, parents = ([], []) if reading else self.draft(request)
            drafts.append(DraftTokens(tokens, np.array(parents, np.int32)) if tokens else [])
            texts[r, : len(request.text)] = request.text
            own = request.text[request.computed :] + tokens
            scheduled.append(len(own))
            inputs += own
        computed = np.array([request.computed for request in batch], np.int32)
        names = [str(r) for r in range(len(batch))]
        num_scheduled, input_ids = (np.array(each, np.int32) for each in (scheduled, inputs))
        return BatchView(names, drafts, num_scheduled, computed, texts, input_ids)

    def forward(self, batch, view, step) -> tuple[list[Seen], list[int]]:
        """What each batch row has seen, and its slot."""
        seen: list[Seen] = []
        slots: list[int] = []
        verified_rows, by_row = step.batch_rows.tolist(), position_shifts(step.rows).tolist()
        shifts = dict(zip(verified_rows, by_row, strict=True))
        for r, request in enumerate(batch):
            # What the rows can see of the text is what is in the cache.
            before = [self.cache.get(self.slot(request, i)) for i in range(request.computed)]
            context = tuple(-1 if value is None else value[1][-1] for value in before)
            verified = int(np.diff(step.rows.starts)[r])
            first = int(view.num_scheduled[r]) - verified
            paths: list[tuple[int, ...]] = []
            for i in range(int(view.num_scheduled[r])):
                row = len(seen)
                parent = i - 1
                if i > first:
                    parent = first + int(step.rows.parents[step.rows.starts[r] + i - first])
                if self.broken == "rejected tokens are visible":
                    parent = i - 1
                paths.append((*(paths[parent] if parent >= 0 else ()), int(view.input_ids[row])))
                shift = 0 if self.broken == "positions are not shifted" else shifts.get(row, 0)
                position = request.computed + i + shift
                seen.append((position, context + paths[-1]))
                slots.append(self.slot(request, request.computed + i))
                self.cache[slots[-1]] = seen[-1]
        return seen, slots

    def check(self, request: Request) -> None:
        """I1 to I3 and I5: no gap, right positions, a key and value for all but the newest token,
        each of what it stands for, and the text that plain decoding would have."""
        assert request.text == request.goal[: len(request.text)]
        assert request.computed == len(request.text) - 1
        for i in range(request.computed):
            value = self.cache[self.slot(request, i)]
            assert value == (i, tuple(request.text[: i + 1]))


def ragged(rng: np.random.Generator) -> Callable[[Request], tuple[list[int], list[int]]]:
    """Trees that hold none, some or all of the truth at arbitrary places; chains; nothing."""

    def draft(request: Request) -> tuple[list[int], list[int]]:
        truth = request.goal[len(request.text) :][: int(rng.integers(0, 6))]
        size, tokens, parents, tip = int(rng.integers(0, 10)), [], [], -1
        if rng.random() < 0.3:
            return truth, list(range(-1, len(truth) - 1))
        while len(tokens) < size:
            if truth and rng.random() < 0.5:
                parents.append(tip)
                tokens.append(truth.pop(0))
                tip = len(tokens) - 1
            else:
                parents.append(int(rng.integers(-1, len(tokens))))
                tokens.append(int(rng.integers(VOCAB)))
        return tokens, parents

    return draft


def serve(size: int, seed: int, broken: str | None = None) -> int:
    """Answers 12 requests, at most ``size`` at once, in another order in every step. Returns the
    drafted tokens that were accepted."""
    rng = np.random.default_rng(seed)
    engine = Engine(ragged(rng), broken)
    waiting = [
        (rng.integers(0, VOCAB, rng.integers(1, 20)).tolist(), int(rng.integers(1, 40)))
        for _ in range(12)
    ]
    batch: list[Request] = []
    accepted, ended = 0, []
    while waiting or batch:
        while waiting and len(batch) < size:
            batch.append(engine.add(*waiting.pop()))
        rng.shuffle(batch)
        accepted += sum(engine.step(batch))
        for request in batch:
            engine.check(request)
        ended += [request for request in batch if len(request.text) == len(request.goal)]
        batch = [request for request in batch if len(request.text) < len(request.goal)]
        for request in ended:  # I6
            assert request.text == request.goal
    assert len(ended) == 12
    return accepted


@pytest.mark.parametrize("size", [1, 2, 7, 12])
@pytest.mark.parametrize("seed", range(5))
def test_they_hold_after_every_step(size, seed):
    assert serve(size, seed) > 20


@pytest.mark.parametrize(
    "broken",
    [
        "positions are not shifted",
        "rejected tokens are visible",
        "rejected tokens stay in the cache",
        "rejected tokens count as text",
        "the bonus token counts as cached",
    ],
)
@pytest.mark.parametrize("size", [1, 7])
def test_the_papers_failures_are_found(broken, size):
    with pytest.raises(AssertionError):
        serve(size, 0, broken)


def test_the_worked_case():
    """Two texts of three tokens and of one, of which none and both of two drafts are accepted."""
    drafts: dict[int, list[int]] = {}
    engine = Engine(lambda request: (drafts[id(request)], [-1, 0]))
    first, second = batch = [engine.add([1, 2, 3], 9), engine.add([4], 9)]
    drafts[id(first)] = [first.goal[3] ^ 1, 0]
    drafts[id(second)] = second.goal[1:3]
    for i in range(2):  # all of the first prompt but its last token has been read
        engine.cache[engine.slot(first, i)] = (i, tuple(first.text[: i + 1]))
    first.computed = 2
    assert engine.step(batch) == [0, 2]
    assert [len(request.text) for request in batch] == [4, 4]
    assert [request.computed for request in batch] == [3, 3]
    for request in batch:
        engine.check(request)
