"""EAGLE heads against their formulas; their executor; what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.drafting.test_graphs import record_on_cpu
from tests.eagle_heads import HIDDEN, Reference, save_head
from tests.model_configs import target
from vllm_specplus.config import parse
from vllm_specplus.drafting.eagle import EagleHead
from vllm_specplus.drafting.eagle_checkpoint import read_config
from vllm_specplus.drafting.graphs import Record
from vllm_specplus.drafting.head_executor import MOST_WAITING, HeadExecutor
from vllm_specplus.step import TargetRows

VOCAB, PAGE = 50, 8
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@dataclass
class Vocabulary:
    """A target's embedding and output layer."""

    embedding: torch.Tensor
    matrix: torch.Tensor

    def embed(self, tokens):
        return self.embedding[tokens]

    def output(self, normed):
        return normed @ self.matrix.T


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    generator = torch.Generator().manual_seed(0)
    embedding, output = torch.randn(2, VOCAB, HIDDEN, generator=generator)
    return Vocabulary(embedding, 0.1 * output)


class Texts:
    """Texts, what the target computes of them, and where its scheduler puts them."""

    def __init__(self, lengths: list[int], states: int, pages: list[list[int]]):
        rng = np.random.default_rng(1)
        self.tokens = rng.integers(0, VOCAB, (len(lengths), 200)).astype(np.int32)
        self.states = torch.from_numpy(rng.normal(size=(len(lengths), 200, states * HIDDEN)))
        self.states = self.states.float()
        self.lengths = np.array(lengths)
        self.pages = np.zeros((len(lengths), 25), np.int32)
        for row, own in zip(self.pages, pages, strict=True):
            row[: len(own)] = own

    def rows(self, ranges: list[tuple[int, int]]) -> TargetRows:
        """What the target has just computed, (from, to) of each text."""
        counts = [end - begin for begin, end in ranges]
        return TargetRows(
            states=torch.cat([self.states[r, a:b] for r, (a, b) in enumerate(ranges)]),
            positions=np.concatenate([np.arange(a, b) for a, b in ranges]),
            starts=np.concatenate(([0], np.cumsum(counts))),
            pages=self.pages,
        )


def executor(
    folder: str, vocabulary: Vocabulary, pages: int = 40, record: Record | None = None,
    page: int = PAGE,
) -> HeadExecutor:  # fmt: skip
    head = EagleHead(folder, vocabulary, VOCAB, torch.device("cpu"), torch.float32)
    run = HeadExecutor(head, 6, max_requests=4, pages=pages, page=page, record=record)
    run.warm_up((1, 2), 4)
    return run


HEADS = {
    "eagle": {"generation": 1, "spread": 0.1},
    "eagle3": {"generation": 3},
    "eagle3-own-tokens": {"generation": 3, "own_tokens": 20},
    "eagle3-variants": {
        "generation": 3, "own_tokens": 20, "norm_before_residual": True, "norm_before_fc": True,
        "norm_output": True,
    },
    "eagle3-fc-norm": {"generation": 3, "fc_norm": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "record", "page"),
    [
        *((name, None, PAGE) for name in HEADS),
        ("eagle3", record_on_cpu, PAGE),
        ("eagle3", None, 16),  # packed
        ("eagle3", record_on_cpu, 16),
    ],
)
def test_logits_are_those_of_the_formulas(tmp_path, vocabulary, name, record, page):
    """Prompts in pieces, steps undrafted, rounds of trees, in a batch of different lengths."""
    folder = save_head(tmp_path, vocab=VOCAB, **HEADS[name])
    reference = Reference(folder, vocabulary.embedding, vocabulary.matrix)
    run = executor(folder, vocabulary, record=record, page=page)
    assert run.cache.packed == (page == 16)
    pages = [[5, 37, 36, 35], [*range(10, 25)], [6, 7, 8, 9, 25, 26, 27]]
    texts = Texts([3, 70, 30], run.model.config.states, pages)
    names = ["a", "b", "c"]

    def expected(r: int, path: list[int]) -> torch.Tensor:
        length = texts.lengths[r]
        text, states = texts.tokens[r, :length].tolist(), texts.states[r, : length - 1]
        return reference(text, states, path)

    # The prompts; b's in three pieces.
    run.follow(names, texts.tokens, texts.rows([(0, 2), (0, 5), (0, 29)]))
    run.follow(names, texts.tokens, texts.rows([(2, 2), (5, 60), (29, 29)]))
    run.follow(names, texts.tokens, texts.rows([(2, 2), (60, 69), (29, 29)]))
    rng = np.random.default_rng(2)
    for _ in range(2):
        logits = run.begin(names, np.arange(3), texts.lengths)
        for r in range(3):
            torch.testing.assert_close(logits[r], expected(r, []), **CLOSE)
        first = torch.from_numpy(rng.integers(0, VOCAB, (3, 2)))
        logits = run.grow(torch.arange(3), first, torch.tensor([[-1, -1]] * 3))
        for r in range(3):
            for j in range(2):
                torch.testing.assert_close(logits[r, j], expected(r, [int(first[r, j])]), **CLOSE)
        # One tree ends here.
        second = torch.from_numpy(rng.integers(0, VOCAB, (2, 2)))
        logits = run.grow(torch.tensor([0, 2]), second, torch.tensor([[1, 0], [1, 1]]))
        for a, (r, parents) in enumerate(((0, (1, 0)), (2, (1, 1)))):
            for j, parent in enumerate(parents):
                path = [int(first[r, parent]), int(second[a, j])]
                torch.testing.assert_close(logits[a, j], expected(r, path), **CLOSE)
        # One to three tokens more of each; then so many steps undrafted that some are read late.
        for grown in [np.array([1, 2, 3]), *[np.array([1, 0, 1])] * (MOST_WAITING + 3)]:
            before = texts.lengths - 1
            texts.lengths = texts.lengths + grown
            ranges = list(zip(before.tolist(), (texts.lengths - 1).tolist(), strict=True))
            run.follow(names, texts.tokens, texts.rows(ranges))
    assert len(run._waiting["a"]) <= MOST_WAITING
    # What waits is a few rows, and not the steps they come from.
    kept = run._waiting["a"].states[0].untyped_storage().nbytes()
    assert kept <= 4 * run.model.config.states * HIDDEN * MOST_WAITING


def test_a_cached_beginning_is_seen_as_far_as_it_was_read(tmp_path, vocabulary):
    """b begins with a's first two pages, of which the head read all but the last four rows."""
    folder = save_head(tmp_path, 3, VOCAB)
    run = executor(folder, vocabulary)
    texts = Texts([2 * PAGE + 2, 3 * PAGE], 3, [[3, 4, 5], [3, 4, 6]])
    texts.tokens[1, : 2 * PAGE + 1] = texts.tokens[0, : 2 * PAGE + 1]
    texts.states[1, : 2 * PAGE] = texts.states[0, : 2 * PAGE]
    read = 2 * PAGE - 4
    for piece in [(0, read), (read, 2 * PAGE)]:
        run.follow(["a"], texts.tokens[:1], texts.rows([piece]))
        if piece[0] == 0:
            run._pass_text([0], [run._waiting["a"].take(read)])
    run.forget("a")
    run.follow(["b"], texts.tokens[1:], _second(texts, (2 * PAGE, 3 * PAGE - 1)))
    logits = run.begin(["b"], np.arange(1), texts.lengths[1:])
    reference = Reference(folder, vocabulary.embedding, vocabulary.matrix)
    text, states = texts.tokens[1, : 3 * PAGE].tolist(), texts.states[1, : 3 * PAGE - 1]
    seen = [*range(read), *range(2 * PAGE, 3 * PAGE - 1)]
    torch.testing.assert_close(logits[0], reference(text, states, [], seen), **CLOSE)
    assert not torch.allclose(logits[0], reference(text, states, []), **CLOSE)


def _second(texts: Texts, piece: tuple[int, int]) -> TargetRows:
    """Rows of the second text, alone in the batch."""
    begin, end = piece
    return TargetRows(
        texts.states[1, begin:end], np.arange(begin, end), np.array([0, end - begin]),
        texts.pages[1:],
    )  # fmt: skip


def test_a_text_computed_anew_is_read_anew(tmp_path, vocabulary):
    """After a preemption: other pages, from the beginning."""
    folder = save_head(tmp_path, 1, VOCAB)
    run = executor(folder, vocabulary)
    texts = Texts([20], 1, [[3, 4, 5]])
    run.follow(["a"], texts.tokens, texts.rows([(0, 19)]))
    before = run.begin(["a"], np.arange(1), texts.lengths)
    texts.pages[0, :3] = [7, 8, 9]
    run.follow(["a"], texts.tokens, texts.rows([(0, 19)]))
    torch.testing.assert_close(run.begin(["a"], np.arange(1), texts.lengths), before)


def test_without_the_last_hidden_state_nothing_is_drafted(tmp_path, vocabulary):
    run = executor(save_head(tmp_path, 1, VOCAB), vocabulary)
    texts = Texts([20], 1, [[3, 4, 5]])
    run.follow(["a"], texts.tokens, texts.rows([(0, 10)]))
    with pytest.raises(RuntimeError, match="no hidden states behind token 18 of a"):
        run.begin(["a"], np.arange(1), texts.lengths)


def edit(folder: str, drop: str = "", **tensors: torch.Tensor) -> None:
    path = Path(folder) / "model.safetensors"
    kept = {name: w.clone() for name, w in load_file(path).items() if name != drop}
    save_file(kept | tensors, path)


@pytest.mark.parametrize(
    ("keys", "change", "sentence"),
    [
        ({}, lambda f: (Path(f) / "config.json").unlink(), "it has no config.json"),
        ({}, lambda f: (Path(f) / "config.json").write_text("{"), "unreadable"),
        ({}, lambda f: (Path(f) / "model.safetensors").unlink(), "holds no .safetensors file"),
        ({}, lambda f: (Path(f) / "model.safetensors").write_text("x"), "is no safetensors file"),
        ({}, lambda f: edit(f, "fc.weight"), "is no EAGLE head: it lacks fc.weight"),
        ({}, lambda f: edit(f, q_norm=torch.ones(3)), "are unknown here: q_norm"),
        ({"own_tokens": 9}, lambda f: edit(f, "lm_head.weight"), "has no lm_head.weight for them"),
        ({"own_tokens": 9}, lambda f: edit(f, "d2t"), "predicts 50 tokens, and its lm_head.weight"),
        ({"quantization_config": {"bits": 4}}, None, "is quantized"),
        ({"model_type": "gpt2"}, None, "has a layer of type 'gpt2'"),
        ({"speculators_model_type": "hass"}, None, "a speculator of type 'hass'"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, None, "are not the states of 2 layers"),
        ({"target_hidden_size": 60}, None, "cannot use the embedding of its target, of 60"),
    ],
)
def test_heads_that_cannot_run_are_refused(tmp_path, keys, change, sentence):
    folder = save_head(tmp_path, 3, VOCAB, **keys)
    if change:
        change(folder)
    with pytest.raises(ValueError, match=sentence):
        parse({"method": "eagle_tree", "model": folder})


def test_an_eagle_head_reads_an_embedding_and_a_hidden_state(tmp_path):
    folder = save_head(tmp_path, 1, VOCAB)
    edit(folder, **{"fc.weight": torch.zeros(HIDDEN, 3 * HIDDEN)})
    with pytest.raises(ValueError, match="reads 192 units, not an embedding and a hidden state"):
        parse({"method": "eagle_tree", "model": folder})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"family": "gpt2", "gives_layers": lambda: False},
            "vLLM hands out of some models and not of one of type 'gpt2'",
        ),
        ({"hidden_size": 65}, "of 64 hidden units, and this one has 65"),
        ({"vocab_size": 51}, "of 50 tokens, and this one has 51"),
        ({"num_layers": 3}, "reads layer 4, and the target has 3"),
    ],
)
def test_targets_that_a_head_was_not_made_for_are_refused(tmp_path, fields, sentence):
    folder = save_head(tmp_path, 3, VOCAB, eagle_aux_hidden_state_layer_ids=[1, 2, 4])
    config = parse({"method": "eagle_tree", "model": folder})
    fits = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_layers": 8}
    config.check_target(target(**fits))
    with pytest.raises(ValueError, match=sentence):
        config.check_target(target(**fits | fields))


def test_what_speculators_write_is_read(tmp_path):
    """The layer's config inside, other names, other defaults."""
    folder = save_head(tmp_path, 3, VOCAB, own_tokens=20)
    raw = json.loads((tmp_path / "config.json").read_text())
    layer = {key: value for key, value in raw.items() if key not in ("architectures",)}
    outer = {"speculators_model_type": "eagle3", "transformer_layer_config": layer}
    (tmp_path / "config.json").write_text(json.dumps(outer | {"draft_vocab_size": 20}))
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {k.replace("midlayer.", "layers.0."): w.clone() for k, w in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    head = read_config(folder)
    assert (head.generation, head.states, head.norm_before_residual) == (3, 3, True)


def test_an_own_context_is_no_key_of_a_head(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'kv_memory_mb'"):
        parse({"method": "eagle_tree", "model": save_head(tmp_path, 1, VOCAB), "kv_memory_mb": 9})
