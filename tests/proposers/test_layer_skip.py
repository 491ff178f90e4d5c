"""``layer_skip``: what it tries, when, and what it tells its search."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.drafting.test_drafting import VOCAB, save_draft
from tests.drafting.test_self_speculation import FakeTarget, load
from vllm_specplus.config import parse
from vllm_specplus.drafting.self_speculation import WINDOW
from vllm_specplus.drafting.skip_search import Skips
from vllm_specplus.proposer import Services
from vllm_specplus.proposers.layer_skip import REPLAY_EVERY, LayerSkip
from vllm_specplus.step import bare_step

LAYERS, LEVELS, PROMPT = 6, 4, 5
KEYS = {"method": "layer_skip", "shape": "chain", "num_speculative_tokens": LEVELS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_draft(tmp_path_factory.mktemp("target"), layers=LAYERS)


@pytest.fixture
def counted() -> Counter:
    return Counter()


def made(folder: str, counted: Counter, **keys) -> LayerSkip:
    services = Services(
        VOCAB, count=lambda name: counted.update([name]), num_layers=LAYERS,
        target_layers=lambda: load(folder),
    )  # fmt: skip
    proposer = LayerSkip(parse(KEYS | keys), services)
    proposer.load_draft(torch.device("cpu"), torch.float32)
    return proposer


def draft(proposer: LayerSkip, folder: str, texts: list[np.ndarray]) -> np.ndarray:
    """A round; int32 [R] how many levels came."""
    table = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = text
    step = replace(
        bare_step(proposer.sources, table, LEVELS),
        num_tokens=np.array([len(text) for text in texts], np.int32),
        num_prompt_tokens=np.full(len(texts), PROMPT, np.int32),
        target_kv=FakeTarget(folder, texts),
    )
    return proposer.propose(step).counts


def random_texts(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in lengths]


@pytest.mark.slow
def test_pairs_are_tried_every_eighth_round(folder, counted):
    proposer = made(folder, counted)
    texts = random_texts(30, 12)
    for number in range(2 * REPLAY_EVERY):
        assert proposer._search.trials == number // REPLAY_EVERY
        assert draft(proposer, folder, texts).tolist() == [LEVELS] * 2
    assert proposer._search.trials == 2
    assert proposer._executor.skips == Skips.of(proposer._search.best)


def test_swift_tries_every_round_once_there_are_enough_tokens(folder, counted, monkeypatch):
    """The 32 behind the first of an answer, of requests that have so many."""
    proposer = made(folder, counted, search="swift")
    asked = []
    replay = proposer._executor.replay

    def watched(names, texts, starts, skips, exits, ends, in_line):
        asked.append((names, starts.tolist(), ends.tolist(), in_line))
        return replay(names, texts, starts, skips, exits, ends, in_line)

    monkeypatch.setattr(proposer._executor, "replay", watched)
    short, long = PROMPT + WINDOW, PROMPT + WINDOW + 1
    draft(proposer, folder, random_texts(short, 9))
    assert (proposer._search.trials, asked) == (0, [])
    for _ in range(3):
        draft(proposer, folder, random_texts(short, long + 20))
    assert proposer._search.trials == 3
    assert asked == [(["request 1"], [PROMPT + 1], [long], True)] * 3


@pytest.mark.slow
def test_a_set_that_is_given_is_kept(folder, counted, tmp_path):
    """Of the attentions that are left out for good, nothing is copied."""
    file = tmp_path / "skips.json"
    file.write_text(json.dumps({"skip_attention": [1, 3], "skip_mlp": [2]}))
    given = Skips(frozenset({1, 3}), frozenset({2}))
    for keys in ({"skips": str(file)}, {"skip_attention": [1, 3], "skip_mlp": [2]}):
        proposer = made(folder, counted, **keys)
        for _ in range(REPLAY_EVERY):
            draft(proposer, folder, random_texts(30))
        assert proposer._search is None
        assert proposer._executor.skips == given
        assert proposer._executor.cache.layers == [0, 2, 4, 5]
    searching = made(folder, counted)
    searching.leave_out(given)
    draft(searching, folder, random_texts(30))
    assert (searching._search, searching._executor.skips) == (None, given)
    assert searching._executor.cache.layers == list(range(LAYERS))


@pytest.mark.slow
def test_a_search_hears_of_acceptance_and_begins_anew(folder, counted):
    """Texts that grow by whole drafts, then by a token a round."""
    proposer = made(folder, counted)
    (text,) = random_texts(400)
    length = 30
    for number in range(60):
        draft(proposer, folder, [text[:length]])
        length += 1 + LEVELS * (number < 20)
    assert counted["draft_layer_searches"] == proposer._search.restarts >= 1
