"""Block heads against their formulas, row by row, through their executor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.block_heads import (
    CANDIDATES,
    HIDDEN,
    Reference,
    medusa_reference,
    save_block,
    save_medusa,
)
from tests.drafting.test_eagle import CLOSE, PAGE, VOCAB, Texts, Vocabulary
from vllm_specplus.drafting import block_executor
from vllm_specplus.drafting.block_executor import BlockExecutor, MedusaExecutor
from vllm_specplus.drafting.block_heads import BlockHead, load_head
from vllm_specplus.step import TargetRows

SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True,
    "sliding_window": 9,
}  # fmt: skip
AUTHORS = {"writer": "authors"}
NAMES = ["a", "b", "c"]
HEADS = {
    "dflash": {"kind": "dflash"},
    "dflash-authors": {"kind": "dflash", "bias": True, **AUTHORS},
    "dflash-own-tokens": {"kind": "dflash", "own_tokens": 20},
    "dflash-own-parts": {
        "kind": "dflash", "own": ("lm_head", "embed_tokens", "mask_embedding"), "target": 32,
    },
    "dflash-windows": {"kind": "dflash", **SLIDING},
    "dflash-windows-non-causal": {"kind": "dflash", **SLIDING, "sliding_window_non_causal": True},
    "dflash-windows-authors": {"kind": "dflash", **SLIDING, **AUTHORS},
    "dflash-causal-authors": {"kind": "dflash", "causal": True, **AUTHORS},
    "dspark": {"kind": "dspark", "own": ("confidence_head",)},
    "dspark-authors": {"kind": "dspark", "block": 9, **AUTHORS},
    "dspark-own-tokens": {"kind": "dspark", "own_tokens": 20},
    "dspark-bonus-anchor": {"kind": "dspark", "sample_from_anchor": False},
    "dspark-without-markov": {"kind": "dspark", "rank": 0, "confidence_head_with_markov": False},
    "dspark-trusts-rows": {
        "kind": "dspark", "own": ("confidence_head",), "rank": 0,
        "confidence_head_with_markov": False,
    },
    "dspark-trusts-rows-authors": {
        "kind": "dspark", "own": ("confidence_head",), "confidence_head_with_markov": False,
        **AUTHORS,
    },
    "dspark-does-not-say": {
        "kind": "dspark", "own": ("confidence_head",), "enable_confidence_head": False,
    },
    "dflash2": {"kind": "dflash2"},
    "dflash2-authors": {
        "kind": "dflash2", "block": 5, "input_embedding_scale": 1.5, "output_multiplier": 0.5,
        "final_logit_softcapping": 3.0, **AUTHORS,
    },
    "dflash2-windows": {"kind": "dflash2", **SLIDING},
}  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    generator = torch.Generator().manual_seed(0)
    embedding, output = torch.randn(2, VOCAB, HIDDEN, generator=generator)
    return Vocabulary(embedding, 0.1 * output)


class Recorded(BlockHead):
    """Keeps the logits of the last block."""

    def logits(self, hidden):
        self.last = super().logits(hidden)
        return self.last


def executor(folder: str, vocabulary: Vocabulary, pages: int = 40) -> BlockExecutor:
    head = load_head(folder, vocabulary, VOCAB, torch.device("cpu"), torch.float32)
    head.__class__ = Recorded
    return BlockExecutor(head, pages, PAGE, max_requests=4)


def narrow(texts: Texts, states: int, target: int) -> None:
    """Give the texts hidden states of a target of ``target`` units."""
    texts.states = texts.states[..., : states * target].contiguous()


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_those_of_the_formulas(tmp_path, vocabulary, name):
    """Prompts in pieces, steps undrafted, rejected rows, in a batch of different lengths."""
    folder = save_block(tmp_path, vocab=VOCAB, **HEADS[name])
    reference = Reference(folder, vocabulary.embedding, vocabulary.matrix)
    run = executor(folder, vocabulary)
    pages = [[5, 37, 36, 35], [*range(10, 25)], [6, 7, 8, 9, 25, 26, 27]]
    texts = Texts([3, 70, 30], 2, pages)
    narrow(texts, 2, HEADS[name].get("target", HIDDEN))
    # The prompts; b's in three pieces.
    for piece in (
        [(0, 2), (0, 5), (0, 29)],
        [(2, 2), (5, 60), (29, 29)],
        [(2, 2), (60, 69), (29, 29)],
    ):
        run.follow(NAMES, texts.tokens, texts.rows(piece))

    def check(requests: list[int]) -> None:
        at = np.array(requests)
        newest = texts.tokens[at, texts.lengths[at] - 1]
        rows = texts.rows([(n - 2, n - 1) for n in texts.lengths.tolist()])
        laws = run.draft(rows, at, newest, texts.lengths[at], width=20)
        for a, r in enumerate(requests):
            length = int(texts.lengths[r])
            text = texts.tokens[r, :length].tolist()
            logits = reference(text, texts.states[r, : length - 1])
            torch.testing.assert_close(run.head.last[a], logits, **CLOSE)
            check_laws(laws, a, reference, logits, text[-1])

    check([0, 1, 2])
    # A block that is rejected leaves nothing: its keys and values are behind the target's pages.
    for grown in np.array([1, 2, 3]), np.array([1, 0, 5]), np.array([4, 1, 1]):
        before = texts.lengths - 1
        texts.lengths = texts.lengths + grown
        after = (texts.lengths - 1).tolist()
        run.follow(NAMES, texts.tokens, texts.rows(list(zip(before.tolist(), after, strict=True))))
        check([0, 2] if grown[1] == 0 else [2, 1, 0])


def check_laws(laws, a: int, reference: Reference, logits: torch.Tensor, newest: int) -> None:
    """Along the most probable path and beside it: the law of the formula, of the candidates that
    there are."""
    candidate, previous = 0, newest
    conditional = laws.given.shape[2] > 1
    for depth in range(len(logits)):
        law = candidate if conditional and depth else 0
        everything = reference.law(logits[depth], previous, depth)
        trust = reference.trust(depth, previous)
        number = {int(token): i for i, token in enumerate(reference.ids)}
        order = laws.order[a, depth, law]
        own = torch.tensor([number[int(t)] for t in laws.tokens[a, depth, order]])
        wanted = everything[own]
        of_candidates = conditional and (depth or reference.second)
        if of_candidates:
            wanted = wanted.log_softmax(-1)
        given = torch.from_numpy(laws.given[a, depth, law])
        torch.testing.assert_close(given, wanted + trust, **CLOSE)
        if not of_candidates:  # the most probable ones of all
            best = everything.topk(len(own)).values
            torch.testing.assert_close(wanted, best, **CLOSE)
        if reference.second:
            assert set(own.tolist()) == set(logits[depth].topk(CANDIDATES).indices.tolist())
        candidate = int(order[-1])
        previous = int(laws.tokens[a, depth, candidate])


def test_positions_and_rows_of_the_card(tmp_path, vocabulary):
    """Example 3: n = 10, k = 3. DFlash's queries are at 10 to 13, and the masks predict 11 to 13;
    DSpark's are at 10 to 12."""
    for kind, block, queries in (("dflash", 4, 4), ("dspark", 3, 3)):
        folder = save_block(tmp_path / kind, kind, VOCAB, block=block)
        run = executor(folder, vocabulary)
        assert (run.head.config.depth, run.head.body.queries) == (3, queries)
        seen = []
        run.head.rotary = lambda at, old=run.head.rotary, s=seen: (s.append(at), old(at))[1]
        texts = Texts([11], 2, [[3, 4]])
        run.follow(NAMES, texts.tokens, texts.rows([(0, 10)]))
        rows = texts.rows([(9, 10)])
        run.draft(rows, np.arange(1), texts.tokens[:1, 10], texts.lengths, 4)
        assert seen[0].tolist() == [list(range(10))]  # the context
        assert seen[1].tolist() == [list(range(10, 10 + queries))]


def test_ids_of_a_head_of_few_tokens(tmp_path, vocabulary):
    """Example 8: d2t (0, 2, 5) are the ids 0, 3, 7."""
    from tests.drafting.test_eagle import edit

    folder = save_block(tmp_path, "dflash", VOCAB, own_tokens=3)
    edit(folder, d2t=torch.tensor([0, 2, 5]))
    head = load_head(folder, vocabulary, VOCAB, torch.device("cpu"), torch.float32)
    laws = head.laws(torch.randn(1, 3, HIDDEN), torch.tensor([1]), 9)
    assert {*laws.tokens.flatten().tolist()} == {0, 3, 7}
    edit(folder, d2t=torch.tensor([0, 2, VOCAB]))
    with pytest.raises(ValueError, match="predicts tokens beyond the 50 of its target"):
        load_head(folder, vocabulary, VOCAB, torch.device("cpu"), torch.float32)


def test_context_in_a_shared_page_is_exact(tmp_path, vocabulary):
    """b begins with a's first two pages, which only a was read for."""
    folder = save_block(tmp_path, "dflash", VOCAB)
    run = executor(folder, vocabulary)
    texts = Texts([2 * PAGE + 2, 3 * PAGE], 2, [[3, 4, 5], [3, 4, 6]])
    texts.tokens[1, : 2 * PAGE] = texts.tokens[0, : 2 * PAGE]
    texts.states[1, : 2 * PAGE] = texts.states[0, : 2 * PAGE]
    run.follow(NAMES, texts.tokens, texts.rows([(0, 2 * PAGE + 1), (0, 0)]))
    run.follow(NAMES, texts.tokens, texts.rows([(0, 0), (2 * PAGE, 3 * PAGE - 1)]))
    rows = texts.rows([(0, 0), (3 * PAGE - 2, 3 * PAGE - 1)])
    length = texts.lengths[1:]
    run.draft(rows, np.array([1]), texts.tokens[1:, 3 * PAGE - 1], length, 4)
    reference = Reference(folder, vocabulary.embedding, vocabulary.matrix)
    text, states = texts.tokens[1, : 3 * PAGE].tolist(), texts.states[1, : 3 * PAGE - 1]
    torch.testing.assert_close(run.head.last[0], reference(text, states), **CLOSE)
    # A negative control: what is in the pages matters.
    run.follow(NAMES, texts.tokens, _wrong_row(texts))
    run.draft(rows, np.array([1]), texts.tokens[1:, 3 * PAGE - 1], length, 4)
    assert not torch.allclose(run.head.last[0], reference(text, states), **CLOSE)


def _wrong_row(texts: Texts) -> TargetRows:
    """The row of position 4 with the states of another."""
    rows = texts.rows([(0, 0), (4, 5)])
    rows.states = texts.states[1, 9:10]
    return rows


def test_blocks_are_the_same_in_groups(tmp_path, vocabulary, monkeypatch):
    """Logits of a batch are not all made at once."""
    run = executor(save_block(tmp_path, "dspark", VOCAB), vocabulary)
    texts = Texts([3, 70, 30], 2, [[5, 37, 36, 35], [*range(10, 25)], [6, 7, 8, 9, 25, 26, 27]])
    run.follow(NAMES, texts.tokens, texts.rows([(0, 2), (0, 69), (0, 29)]))
    rows = texts.rows([(n - 2, n - 1) for n in texts.lengths.tolist()])
    newest = texts.tokens[np.arange(3), texts.lengths - 1]
    whole, parts = None, None
    for most in (1 << 26, 2 * 4 * VOCAB):
        monkeypatch.setattr(block_executor, "MOST_LOGITS", most)
        whole, parts = parts, run.draft(rows, np.arange(3), newest, texts.lengths, 5)
        assert len(run.head.last) == (3 if most > 9999 else 1)  # the last group
    assert (whole.tokens == parts.tokens).all()
    assert (whole.order == parts.order).all()
    assert whole.given == pytest.approx(parts.given, abs=1e-5)


MEDUSA = {
    "own": {},
    "tied": {"own_heads": False, "bias": False},
    "two-layers": {"layers": 2},
}


@pytest.mark.parametrize("name", MEDUSA)
def test_medusa_heads_are_their_formula(tmp_path, vocabulary, name):
    folder = save_medusa(tmp_path, VOCAB, **MEDUSA[name])
    head = load_head(folder, vocabulary, VOCAB, torch.device("cpu"), torch.float32)
    states = torch.randn(7, HIDDEN)
    wanted = [medusa_reference(folder, states[row], vocabulary.matrix) for row in (2, 6)]
    torch.testing.assert_close(head.logits(head(states[[2, 6]])), torch.stack(wanted), **CLOSE)
    # The last rows of the texts.
    run = MedusaExecutor(head)
    none = np.zeros((2, 1), np.int32)
    rows = TargetRows(states, np.arange(7), np.array([0, 3, 7]), none)
    laws = run.draft(rows, np.arange(2), np.zeros(2), np.zeros(2), 5)
    for a in range(2):
        best = wanted[a].log_softmax(-1).topk(5)
        assert (laws.tokens[a] == best.indices.numpy()).all()
        assert laws.given[a, :, 0] == pytest.approx(best.values.numpy(), abs=1e-4)


def test_medusa_names_and_a_map_of_tokens(tmp_path, vocabulary):
    """The authors' names are vLLM's; a token_map says which tokens the rows are of."""
    old = save_medusa(tmp_path / "old", VOCAB, old_names=True)
    new = save_medusa(tmp_path / "new", VOCAB)
    states = torch.randn(2, HIDDEN)
    heads = [
        load_head(each, vocabulary, VOCAB, torch.device("cpu"), torch.float32)
        for each in (old, new, save_medusa(tmp_path / "few", VOCAB, map_tokens=10))
    ]
    first, second, few = (head.logits(head(states)) for head in heads)
    torch.testing.assert_close(first, second)
    assert few.shape == (2, 3, 10)
    laws = heads[2].laws(heads[2](states), torch.zeros(2), 4)
    assert set(laws.tokens.flatten().tolist()) <= set(heads[2]._own.tolist())
