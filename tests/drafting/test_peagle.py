"""P-EAGLE heads against their formulas, row by row, through their executor; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.drafting.test_eagle import CLOSE, PAGE, VOCAB, Texts, Vocabulary, edit
from tests.model_configs import target
from tests.parallel_heads import HIDDEN, MASK, ParallelReference, save_parallel
from vllm_specplus.config import parse
from vllm_specplus.drafting.block_checkpoint import read_config
from vllm_specplus.drafting.block_heads import load_head
from vllm_specplus.drafting.head_executor import MOST_WAITING
from vllm_specplus.drafting.peagle import ParallelHead
from vllm_specplus.drafting.peagle_executor import ParallelExecutor

NAMES = ["a", "b", "c"]
HEADS = {
    "llama": {},
    "one-layer": {"layers": 1, "norm_before_residual": True, "own": ("lm_head", "embed_tokens")},
    "llama-authors": {"writer": "authors", "bias": True, "own": ("input_norm",)},
    "qwen3": {"family": "qwen3", "own_tokens": 20, "layers": 3},
    "qwen3-authors": {"family": "qwen3", "writer": "authors", "own": ("fc_norm",)},
    "one-token": {"depth": 1},
    "long": {"depth": 20},
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    generator = torch.Generator().manual_seed(0)
    embedding, output = torch.randn(2, VOCAB, HIDDEN, generator=generator)
    return Vocabulary(embedding, 0.1 * output)


class Recorded(ParallelHead):
    """Keeps the logits of the last block, and the positions of all passes."""

    def logits(self, hidden):
        self.last = super().logits(hidden)
        return self.last

    def rotary(self, positions):
        self.passes = [*getattr(self, "passes", []), positions.tolist()]
        return super().rotary(positions)


def executor(folder: str, vocabulary: Vocabulary, page: int = PAGE) -> ParallelExecutor:
    head = load_head(folder, vocabulary, VOCAB, torch.device("cpu"), torch.float32)
    head.__class__ = Recorded
    return ParallelExecutor(head, 40, page, max_requests=4)


def draft(run: ParallelExecutor, texts: Texts, requests: list[int], width: int = 5):
    at = np.array(requests)
    newest = texts.tokens[at, texts.lengths[at] - 1]
    rows = texts.rows([(n - 2, n - 1) for n in texts.lengths.tolist()])
    return run.draft(rows, at, newest, texts.lengths[at], width)


@pytest.mark.parametrize(
    ("name", "page"), [*((name, PAGE) for name in HEADS), ("llama", 16), ("qwen3", 16)]
)
def test_logits_are_those_of_the_formulas(tmp_path, vocabulary, name, page):
    """Prompts in pieces, steps undrafted, rejected rows, in a batch of different lengths."""
    folder = save_parallel(tmp_path, VOCAB, **HEADS[name])
    reference = ParallelReference(folder, vocabulary.embedding, vocabulary.matrix)
    run = executor(folder, vocabulary, page)
    assert run.cache.packed == (page == 16)
    depth = run.model.config.depth
    assert depth == HEADS[name].get("depth", 4)
    texts = Texts([3, 70, 30], 3, [[5, 37, 36, 35], [*range(10, 25)], [6, 7, 8, 9, *range(25, 29)]])
    for piece in (
        [(0, 2), (0, 5), (0, 29)],
        [(2, 2), (5, 60), (29, 29)],
        [(2, 2), (60, 69), (29, 29)],
    ):
        run.follow(NAMES, texts.tokens, texts.rows(piece))

    def check(requests: list[int]) -> None:
        laws = draft(run, texts, requests)
        for a, r in enumerate(requests):
            length = int(texts.lengths[r])
            text, states = texts.tokens[r, :length].tolist(), texts.states[r, : length - 1]
            logits = reference(text, states, depth)
            torch.testing.assert_close(run.model.last[a], logits, **CLOSE)
            best = logits.log_softmax(-1).topk(5)
            assert laws.given[a, :, 0] == pytest.approx(best.values.numpy(), abs=1e-4)
            assert (laws.tokens[a] == reference.ids[best.indices].numpy()).all()

    check([0, 1, 2])
    for grown in np.array([1, 2, 3]), np.array([1, 0, 5]), np.array([4, 1, 1]):
        before = texts.lengths - 1
        texts.lengths = texts.lengths + grown
        after = (texts.lengths - 1).tolist()
        run.follow(NAMES, texts.tokens, texts.rows(list(zip(before.tolist(), after, strict=True))))
        check([0, 2] if grown[1] == 0 else [2, 1, 0][: 2 if grown[2] == 1 else 3])
    # So many steps undrafted that some rows are read late, beside one that waits.
    for _ in range(MOST_WAITING + 3):
        before = texts.lengths - 1
        texts.lengths = texts.lengths + np.array([1, 0, 1])
        after = (texts.lengths - 1).tolist()
        run.follow(NAMES, texts.tokens, texts.rows(list(zip(before.tolist(), after, strict=True))))
    check([0, 2])


def test_rows_of_the_card(tmp_path, vocabulary):
    """Example 3: n = 10, k = 3: rows 9 to 11, which predict the tokens at 11 to 13."""
    run = executor(save_parallel(tmp_path, VOCAB, depth=3), vocabulary)
    texts = Texts([10], 3, [[3, 4]])
    run.follow(["a"], texts.tokens, texts.rows([(0, 9)]))
    draft(run, texts, [0])
    texts.lengths += 1
    run.follow(["a"], texts.tokens, texts.rows([(9, 10)]))
    laws = draft(run, texts, [0])
    assert run.model.passes == [[*range(9), 9, 10], [9, 10, 11]]  # each draft is one pass
    assert laws.tokens.shape == (1, 3, 5)


def test_a_rejected_block_leaves_nothing(tmp_path, vocabulary):
    """Masks have no slots in the pages of a text, and rows of text have them once they are read."""
    run = executor(save_parallel(tmp_path, VOCAB), vocabulary)
    texts = Texts([20], 3, [[3, 4, 5]])
    run.follow(["a"], texts.tokens, texts.rows([(0, 19)]))
    draft(run, texts, [0])
    assert run._read.sum() == 19
    assert run._read[3:6].view(-1)[:19].all()


def test_ids_beyond_the_target_are_refused(tmp_path, vocabulary):
    folder = save_parallel(tmp_path, VOCAB, own_tokens=3)
    edit(folder, d2t=torch.tensor([0, 2, VOCAB]))
    with pytest.raises(ValueError, match="predicts tokens beyond the 50 of its target"):
        load_head(folder, vocabulary, VOCAB, torch.device("cpu"), torch.float32)


def test_what_a_config_says(tmp_path):
    folder = save_parallel(tmp_path / "a", VOCAB, eagle_aux_hidden_state_layer_ids=[2, 5, 7])
    head = read_config(folder)
    assert (head.kind, head.depth, head.ahead, head.layer_ids) == ("peagle", 4, 3, (2, 5, 7))
    assert head.body.norm_before_residual is False
    assert read_config(save_parallel(tmp_path / "b", VOCAB, writer="authors")).layer_ids == ()


LAYER = "transformer_layer_config"
WRONG = {
    "no mask state": ({}, lambda f: edit(f, "mask_hidden"), "it lacks mask_hidden"),
    "no fc": ({}, lambda f: edit(f, "fc.weight"), "it lacks fc.weight"),
    "no norm": ({}, lambda f: edit(f, "layers.0.hidden_norm.weight"),
                "it lacks layers.0.hidden_norm.weight"),
    "another layer": ({}, lambda f: edit(f, **{"layers.2.mlp.up_proj.weight": torch.ones(2)}),
                      "unknown here: layers.2.mlp.up_proj.weight"),
    "another shape": ({}, lambda f: edit(f, **{"norm.weight": torch.ones(9)}),
                      r"norm.weight of shape \(9,\), and \(64,\) fits"),
    "mask embedding": ({}, lambda f: edit(f, mask_embedding=torch.ones(64)),
                       "unknown here: mask_embedding"),
    "states": ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, None,
               "which are not the states of 2 layers of 64 units"),
    "layers": ({"eagle_aux_hidden_state_layer_ids": [1, 2, "x"]}, None, "must be whole numbers"),
    "mask units": ({}, lambda f: edit(f, mask_hidden=torch.ones(1, 1, 64)), "and 64 for a mask"),
    "no mask": ({"mask_token_id": None}, None, "says nowhere which token is its mask"),
    "no depth": ({"speculators_config": None}, None, "predicts None tokens at once: say"),
    "depth": ({"speculators_config": None, "num_depths": 0}, None, "predicts 0 tokens at once"),
    "windows": ({"layer_types": ["sliding_attention"] * 2}, None, "has layers with windows"),
    "family": ({LAYER: {"model_type": "gpt2"}}, None, "has layers of type 'gpt2'"),
    "own tokens": ({"draft_vocab_size": 9}, None, "predicts 9 of 50 tokens and says not which"),
    "quantized": ({"quantization_config": {"bits": 4}}, None, "is quantized"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_heads_that_cannot_run_are_refused(tmp_path, name):
    keys, change, sentence = WRONG[name]
    folder = save_parallel(tmp_path, VOCAB, **keys)
    if change:
        change(folder)
    with pytest.raises(ValueError, match=sentence) as told:
        parse({"method": "block_tree", "model": folder})
    assert "\n" not in str(told.value)


def test_the_method_of_eagle_heads_says_whose_it_is(tmp_path):
    with pytest.raises(ValueError, match="is a P-EAGLE head: use the method 'block_tree'"):
        parse({"method": "eagle_tree", "model": save_parallel(tmp_path, VOCAB)})


def test_a_mask_beyond_the_vocabulary_is_refused(tmp_path):
    folder = save_parallel(tmp_path, VOCAB)
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_token_id": 50}))
    config = parse({"method": "block_tree", "model": folder})
    fits = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_layers": 8}
    with pytest.raises(ValueError, match="has mask token 50, and the target 50 tokens"):
        config.check_target(target(**fits))
    assert MASK < VOCAB
