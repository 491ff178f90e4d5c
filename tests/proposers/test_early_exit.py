"""DEL in ``early_exit``: what exits said where the target has verified, request by request."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.drafting.test_drafting import VOCAB, save_draft
from tests.drafting.test_self_speculation import FakeTarget, load
from vllm_specplus.config import parse
from vllm_specplus.drafting.dense_attention import DenseAttention
from vllm_specplus.drafting.exits import ExitStatistics, best_exit
from vllm_specplus.proposer import Services
from vllm_specplus.proposers.early_exit import EarlyExit
from vllm_specplus.step import StepContext, TargetRows, bare_step

LAYERS, EXITS, LEVELS = 6, [1, 3, 5], 4
KEYS = {
    "method": "early_exit", "exit_layers": EXITS, "shape": "chain",
    "num_speculative_tokens": LEVELS, "stop": {"rule": "tau"}, "statistics": "verification",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_draft(tmp_path_factory.mktemp("target"), layers=LAYERS)


@pytest.fixture
def counted() -> Counter:
    return Counter()


def made(folder: str, counted: Counter, **keys) -> EarlyExit:
    services = Services(
        VOCAB, count=lambda name: counted.update([name]), num_layers=LAYERS,
        target_layers=lambda: load(folder),
    )  # fmt: skip
    proposer = EarlyExit(parse(KEYS | keys), services)
    proposer.load_draft(torch.device("cpu"), torch.float32)
    return proposer


@torch.inference_mode()
def entering(folder: str, text: np.ndarray) -> torch.Tensor:
    """[n, exits * hidden] what enters the layers behind each exit."""
    model = load(folder)
    positions = torch.arange(len(text))
    attend = DenseAttention((positions <= positions[:, None])[None, None])
    hidden, rotary = model.embed(torch.from_numpy(text.astype(np.int64))), model.rotary(positions)
    found = []
    for layer in range(max(EXITS)):
        hidden = hidden + model.attention(layer, hidden, rotary, attend)
        hidden = hidden + model.mlp(layer, hidden)
        if layer + 1 in EXITS:
            found.append(hidden)
    return torch.cat(found, -1)


def step_of(
    proposer: EarlyExit, folder: str, texts: list[np.ndarray], prompts: list[int],
    verified: list[tuple[int, int]],
) -> StepContext:  # fmt: skip
    """Texts whose rows at positions ``verified``, from the first to behind the last, were kept."""
    table = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = text
    states = [
        entering(folder, text)[first:end]
        for text, (first, end) in zip(texts, verified, strict=True)
    ]
    positions = [np.arange(first, end) for first, end in verified]
    starts = np.cumsum([0, *(end - first for first, end in verified)])
    return replace(
        bare_step(proposer.sources, table, LEVELS),
        num_tokens=np.array([len(text) for text in texts], np.int32),
        num_prompt_tokens=np.array(prompts, np.int32),
        target_kv=FakeTarget(folder, texts),
        target_rows=TargetRows(
            torch.cat(states),
            np.concatenate(positions),
            starts,
            np.zeros((len(texts), 1), np.int32),
        ),
    )


def said(folder: str, text: np.ndarray, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the rows from ``first`` to behind ``end``: were the exits right, how sure were they?"""
    model, hidden = load(folder), entering(folder, text)[first:end]
    logits = torch.stack([model.logits(each) for each in hidden.chunk(len(EXITS), -1)], 1)
    sure, best = logits.softmax(-1).max(-1)
    return best.numpy() == text[first + 1 : end + 1, None], sure.numpy()


@pytest.mark.slow
def test_shadow_tokens_are_counted_request_by_request(folder, counted):
    """Behind outputs only: the second request has read a prompt, whose last row says the first."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (20, 12)]
    proposer = made(folder, counted)
    assert proposer.hidden_layers == tuple(EXITS)
    assert proposer.reads_hidden
    # Plant what the exits say: rows 15 to 18 of the first text, row 10 of the second.
    for text, rows, exit_ in ((texts[0], (15, 16, 17), 1), (texts[1], (10,), 2)):
        for row in rows:
            model, hidden = load(folder), entering(folder, text)[row]
            text[row + 1] = int(model.logits(hidden.chunk(3, -1)[exit_][None]).argmax())
    step = step_of(proposer, folder, texts, [4, 11], [(15, 19), (0, 11)])
    batch = proposer.propose(step)
    expected = {}
    for name, text, rows in (("request 0", texts[0], (15, 19)), ("request 1", texts[1], (10, 11))):
        expected[name] = ExitStatistics(len(EXITS))
        expected[name].observe(*said(folder, text, *rows))
    np.testing.assert_allclose(proposer._of["request 0"].right, expected["request 0"].right)
    assert proposer._of["request 0"].right[1] >= 0.75
    for name in expected:
        right = proposer._of[name].right
        assert proposer._left[name] == best_exit(right, EXITS, LAYERS, LEVELS)[0]
    assert proposer._executor.exits.tolist() == [proposer._left[name] for name in expected]
    assert (batch.counts >= 1).all()
    assert counted["draft_layer_changes"] == 0


def test_an_exit_moves_with_its_request_alone(folder, counted):
    texts = [np.random.default_rng(1).integers(0, VOCAB, 30).astype(np.int32) for _ in range(2)]
    proposer = made(folder, counted)
    for _ in range(30):
        for name, right in (("request 0", [1, 1, 1]), ("request 1", [0, 0, 1])):
            statistics = proposer._of.setdefault(name, ExitStatistics(3))
            rows = np.tile(np.array(right, bool), (4, 1))
            statistics.observe(rows, np.where(rows, 0.9, 0.4))
    step = step_of(proposer, folder, texts, [4, 4], [(20, 21), (20, 21)])
    proposer.propose(step)
    assert (proposer._left["request 0"], proposer._left["request 1"]) == (1, 5)
    for _ in range(40):
        proposer._of["request 0"].observe(np.tile([False, False, True], (4, 1)), np.ones((4, 3)))
    proposer.propose(step)
    assert proposer._left["request 0"] == 5
    assert counted["draft_layer_changes"] == 1
    proposer.forget("request 0")
    assert "request 0" not in proposer._of
    assert "request 0" not in proposer._left


@pytest.mark.slow
def test_a_draft_stops_where_the_exit_has_been_unsure(folder, counted):
    text = np.random.default_rng(2).integers(0, VOCAB, 30).astype(np.int32)
    for sure, length in ((1.1, 1), (-1.0, LEVELS)):  # above, and below, what any token gets
        proposer = made(folder, counted)
        statistics = proposer._of.setdefault("request 0", ExitStatistics(3))
        for _ in range(99):
            rows = np.tile(np.array([True, False, False]), (9, 1))
            statistics.observe(rows, np.full((9, 3), sure))
            statistics.observe(~rows, np.full((9, 3), sure))
        step = step_of(proposer, folder, [text], [4], [(28, 29)])
        assert proposer.propose(step).counts.tolist() == [length]


def test_layers_above_the_last_exit_have_no_copies(folder, counted):
    proposer = made(folder, counted, exit_layers=[1, 3])
    assert proposer._executor.cache.layers == [0, 1, 2]


def test_without_states_of_the_verification_a_replay_chooses(folder, counted):
    proposer = made(folder, counted, statistics="replay", stop={"rule": "none"})
    assert (proposer.reads_hidden, proposer.hidden_layers) == (False, None)
    text = np.random.default_rng(3).integers(0, VOCAB, 30).astype(np.int32)
    step = step_of(proposer, folder, [text], [4], [(28, 29)])
    for _ in range(8):
        proposer.propose(replace(step, target_rows=None))
    assert proposer._executor.exits is None
    assert proposer._choice._seen > 0


@pytest.mark.parametrize("gives", [True, False])
def test_by_default_it_is_what_the_target_can(gives):
    services = Services(VOCAB, num_layers=LAYERS, gives_layers=lambda: gives)
    proposer = EarlyExit(parse({"method": "early_exit"}), services)
    assert proposer.reads_hidden == gives
    assert proposer.hidden_layers == ((1, 3, 4) if gives else None)
    as_source = {"method": "rasd", "sources": ["token_recycling", "early_exit"]}
    (member,) = [each for each in parse(as_source).members() if each.method == "early_exit"]
    assert member.statistics == "replay"
