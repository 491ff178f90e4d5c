"""What two tokenizers share, and how a draft reads and predicts the target's tokens."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.drafting.test_drafting import logits_of, save_draft
from tests.model_configs import target
from vllm_specplus.config import parse
from vllm_specplus.drafting import shared_tokens
from vllm_specplus.drafting.model import DraftModelError
from vllm_specplus.drafting.shared_tokens import SharedTokens, Spellings
from vllm_specplus.proposer import Services
from vllm_specplus.proposers.draft_tree import DraftTree
from vllm_specplus.step import Sampling, bare_step


def tokenizer(*tokens: str, added: tuple[str, ...] = (), special: tuple[str, ...] = ()):
    """Of these tokens, in the order of their ids; the first of the special ones is in front of a
    text and the last behind it."""
    ids = {token: i for i, token in enumerate(tokens)}
    return SimpleNamespace(
        get_vocab=lambda: ids,
        added_tokens_decoder={ids[token]: token for token in added + special},
        all_special_ids=[ids[token] for token in special],
        bos_token_id=ids[special[0]] if special else None,
        eos_token_id=ids[special[-1]] if special else None,
    )


# Byte level, with an "é" of two bytes and one of them alone; and SentencePiece.
BYTES = tokenizer(
    "<|begin|>", "a", "b", "\u0120a", "\u0120", "\u010a", "Ã©", "Ã", "abc", "<think>", "<|end|>",
    added=("<think>",), special=("<|begin|>", "<|end|>"),
)  # fmt: skip
PIECES = tokenizer(
    "<s>", "\u2581a", "a", "<0x0A>", "<0xC3>", "é", "bc", "b", "\u2581", "<", "</s>",
    special=("<s>", "</s>"),
)  # fmt: skip


def test_tokens_are_the_bytes_they_stand_for():
    texts = Spellings.of(BYTES).texts
    assert [texts[i] for i in range(10)] == [
        b"<|begin|>", b"a", b"b", b" a", b" ", b"\n", b"\xc3\xa9", b"\xc3", b"abc", b"<think>",
    ]  # fmt: skip
    texts = Spellings.of(PIECES).texts
    assert [texts[i] for i in range(9)] == [
        b"<s>", b" a", b"a", b"\n", b"\xc3", b"\xc3\xa9", b"bc", b"b", b" ",
    ]  # fmt: skip


def test_the_table_of_bytes_is_gpt2s():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    theirs = bytes_to_unicode()
    assert shared_tokens._bytes_of_characters() == {char: byte for byte, char in theirs.items()}


def shared(rows: int = 11, predicted: int = 11) -> SharedTokens:
    return SharedTokens(Spellings.of(BYTES), Spellings.of(PIECES), 12, rows, predicted)


def test_texts_are_read_token_by_token():
    """What the draft does not have is spelled by its longest tokens; marks are its own marks."""
    both = shared()
    text = np.array([0, 1, 8, 6, 9, 3, 10, 11, 99, -1], np.int32)
    # "abc" as "a", "bc"; of "<think>" nothing but "<" begins a token; 11 and 99 are no tokens.
    assert both.read(text).tolist() == [0, 2, 2, 6, 5, 9, 1, 10]
    assert both.read(text).dtype == np.int32
    assert both.read(text[:0]).tolist() == both.read(text[-2:]).tolist() == []
    for cut in range(len(text)):  # a text that grows stays what it was
        whole = both.read(text).tolist()
        assert whole[: len(both.read(text[:cut]))] == both.read(text[:cut]).tolist()


def test_what_both_have_is_drafted():
    both = shared()
    drafted = {1: 2, 2: 7, 3: 1, 4: 8, 5: 3, 6: 5, 7: 4}  # target's -> draft's
    assert len(both) == len(drafted)
    given = torch.arange(11.0)[None]
    placed = both.logits(given)
    assert placed.shape == (1, 12)
    for token in range(12):
        wanted = float(drafted[token]) if token in drafted else -torch.inf
        assert float(placed[0, token]) == wanted
    assert both.nodes(torch.tensor([[1, 5], [3, 8]])).tolist() == [[2, 3], [1, 0]]


def test_an_output_layer_of_few_tokens_drafts_those_only():
    both = shared(predicted=5)
    assert len(both) == 4
    assert both.logits(torch.zeros(2, 5)).isfinite().sum(-1).tolist() == [4, 4]
    assert both.read(np.array([6], np.int32)).tolist() == [5]  # it reads them all the same


def test_an_embedding_of_few_rows_reads_those_only():
    assert shared(rows=5, predicted=5).read(np.array([0, 6, 10], np.int32)).tolist() == [0, 4]


def test_one_text_is_one_token_of_each():
    """Where tokenizers have it several times."""
    twice = tokenizer("a", "\u0120", "b", added=("a",))
    twice.get_vocab = lambda: {"a": 0, "\u0120": 1, "b": 2, "a ": 3, " ": 4}
    both = SharedTokens(Spellings.of(twice), Spellings.of(PIECES), 5, 11, 11)
    assert len(both) == 3
    assert both.logits(torch.zeros(1, 11)).isfinite().tolist() == [[True, True, True, False, False]]


# -- drafting -------------------------------------------------------------------------------

WORDS = 96


def permuted(tmp_path, unknown: int) -> tuple[str, SimpleNamespace, SimpleNamespace, np.ndarray]:
    """A draft, its tokenizer, a target's, whose tokens are the draft's in another order and the
    first ``unknown`` ones its own, and the draft's id of every target's."""
    order = np.random.default_rng(7).permutation(WORDS)
    words = [f"w{i:02}" for i in range(WORDS)]
    own = [""] * WORDS
    for i, word in enumerate(words):
        own[order[i]] = f"\u00bf{i}" if i < unknown else word
    return save_draft(tmp_path, vocab=WORDS), tokenizer(*own), tokenizer(*words), order


def drafter(monkeypatch, folder: str, own, theirs, **keys) -> DraftTree:
    monkeypatch.setattr(shared_tokens, "own_tokenizer", lambda folder: own)
    monkeypatch.setattr(shared_tokens, "LEAST", 50)
    config = {"method": "draft_tree", "model": folder, "vocabulary": "intersection", **keys}
    made = DraftTree(parse(config), Services(WORDS, load_tokenizer=lambda: theirs))
    made.load_draft(torch.device("cpu"), torch.float32)
    return made


def test_what_nodes_are_drawn_from_is_the_drafts_law_over_shared_tokens(tmp_path, monkeypatch):
    folder, own, theirs, order = permuted(tmp_path, unknown=20)
    made = drafter(monkeypatch, folder, own, theirs, width=2, num_speculative_tokens=4)
    rng = np.random.default_rng(2)
    text = rng.integers(20, WORDS, (1, 30)).astype(np.int32)
    step = bare_step(made.sources, text, 4)
    hot = Sampling(np.ones(1, np.float32), np.full(1, WORDS, np.int32), np.ones(1, np.float32), [5])
    batch = made.propose(replace(step, sampling=hot))
    assert batch.counts.tolist() == [4]
    assert (batch.tokens >= 20).all()
    whole = logits_of(folder, order[text[0]])
    first = batch.draft_probs[0]
    assert float(first[:20].abs().sum()) == 0
    wanted = whole[torch.from_numpy(order[20:])].softmax(-1)
    torch.testing.assert_close(first[20:], wanted, atol=2e-5, rtol=1e-4)
    node = int(batch.tokens[0])
    behind = logits_of(folder, [*order[text[0]], order[node]])
    wanted = behind[torch.from_numpy(order[20:])].softmax(-1)
    below = batch.drawn_from[batch.parents == 0]
    if len(below):  # whether the second level follows the first node is drawn
        torch.testing.assert_close(
            batch.draft_probs[int(below[0]), 20:], wanted, atol=2e-5, rtol=1e-4
        )


def test_rounds_read_what_is_new(tmp_path, monkeypatch):
    folder, own, theirs, _ = permuted(tmp_path, unknown=20)
    made = drafter(monkeypatch, folder, own, theirs, shape="topk")
    fresh = drafter(monkeypatch, folder, own, theirs, shape="topk")
    text = np.random.default_rng(2).integers(0, WORDS, (1, 40)).astype(np.int32)
    for length in (20, 21, 26, 40):
        now = replace(bare_step(made.sources, text, 12), num_tokens=np.array([length], np.int32))
        kept, anew = made.propose(now), fresh.propose(now)
        fresh.forget("request 0")
        assert kept.tokens.tolist() == anew.tokens.tolist()
        assert (kept.tokens >= 20).all()


def test_a_text_that_the_draft_cannot_read_is_not_drafted_for(tmp_path, monkeypatch):
    folder, own, theirs, _ = permuted(tmp_path, unknown=20)
    made = drafter(monkeypatch, folder, own, theirs, shape="topk")
    text = np.array([[3, 5, 7], [30, 31, 32]], np.int32)  # nothing spells the first one
    assert made.propose(bare_step(made.sources, text, 12)).counts.tolist() == [0, 12]


def test_few_shared_tokens_and_no_tokenizer_are_refused(tmp_path, monkeypatch):
    folder, own, theirs, order = permuted(tmp_path, unknown=20)
    monkeypatch.setattr(shared_tokens, "own_tokenizer", lambda folder: own)
    keys = {"method": "draft_tree", "model": folder, "vocabulary": "intersection"}
    with pytest.raises(DraftModelError, match="share 76 tokens, and 100 are the least"):
        parse(keys).check_target(target(theirs, vocab_size=WORDS))
    with pytest.raises(DraftModelError, match="remove --skip-tokenizer-init, or 'vocabulary'"):
        parse(keys).check_target(target(None, vocab_size=WORDS))
    monkeypatch.setattr(shared_tokens, "LEAST", 76)
    parse(keys).check_target(target(theirs, vocab_size=WORDS))
    few = int((order[20:] < 45).sum())
    with pytest.raises(DraftModelError, match=f"share {few} tokens"):
        parse(keys | {"head_tokens": 45}).check_target(target(theirs, vocab_size=WORDS))


def test_another_vocabulary_has_to_be_asked_for(tmp_path):
    folder = save_draft(tmp_path)
    says = "set 'vocabulary' to 'intersection'"
    with pytest.raises(DraftModelError, match=says):
        parse({"method": "draft_tree", "model": folder}).check_target(target(vocab_size=120))
