"""Long drafts against their formulas; their rings; what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.drafting.test_eagle import Vocabulary
from tests.drafting.test_passes import Largest
from tests.long_heads import DIM, HIDDEN, KV_HEADS, Reference, save_long
from tests.model_configs import target
from vllm_specplus.config import parse
from vllm_specplus.drafting.cache import PAGE, PageStore
from vllm_specplus.drafting.context_pages import ContextPages, PackedPages, PlainPages
from vllm_specplus.drafting.long_draft import LongDraft
from vllm_specplus.drafting.long_executor import LongExecutor
from vllm_specplus.drafting.model import DraftModelError
from vllm_specplus.drafting.shapes import Beams, BestFirst

VOCAB, WINDOW, MAX_NODES = 50, 20, 6
CPU = torch.device("cpu")
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    generator = torch.Generator().manual_seed(0)
    embedding, output = torch.randn(2, VOCAB, HIDDEN, generator=generator)
    return Vocabulary(embedding, 0.1 * output)


def pages_of(store: PageStore, gathered: bool = False) -> ContextPages:
    """The pages of layer 0 as a draft attends to them."""
    if not store.packed:
        return PlainPages(*store.pages_of(0))
    packed = store.packed_pages(0)
    cache = packed.view(*packed.shape[:2], store.page, -1)
    pages = PackedPages(cache, "vec", store.batch())
    if gathered:
        pages.in_place = False
    return pages


class Texts:
    """Texts, what the target's last layer has of them, and where its scheduler puts that."""

    def __init__(self, lengths: list[int], page: int, most: int = 200, kv_heads: int = KV_HEADS):
        rng = np.random.default_rng(1)
        count, width = len(lengths), -(-most // page)
        self.tokens = rng.integers(0, VOCAB, (count, most)).astype(np.int32)
        self.lengths = np.array(lengths)
        self.pages = 1 + rng.permutation(count * width).reshape(count, width).astype(np.int32)
        self.store = PageStore([0], kv_heads, DIM, 1 + count * width, page, torch.float32, CPU)
        slots = self.pages[:, :, None].astype(np.int64) * page + np.arange(page)
        self.slots = torch.from_numpy(slots.reshape(count, -1)[:, :most])
        self.keys, self.values = torch.from_numpy(
            rng.normal(size=(2, count, most, kv_heads, DIM))
        ).float()
        for r in range(count):
            self.store.write(0, self.slots[r], self.keys[r], self.values[r])

    def of(self, r: int) -> np.ndarray:
        return self.tokens[r, : self.lengths[r]]

    def expected(self, reference: Reference, r: int, path: list[int]) -> torch.Tensor:
        known = int(self.lengths[r]) - 1
        seen = self.keys[r, :known], self.values[r, :known]
        return reference(self.of(r).tolist(), path, *seen)

    def begin(self, run: LongExecutor, names: list[str], rows: list[int]) -> torch.Tensor:
        assert all(run.room(name) for name in names)
        return run.begin(names, [self.of(r) for r in rows], self.pages[rows])


def executor(folder: str, vocabulary: Vocabulary, rings: int = 4) -> LongExecutor:
    draft = LongDraft(folder, vocabulary, CPU, torch.float32)
    ring = -(-draft.window // PAGE) + 1 + -(-MAX_NODES // PAGE)
    run = LongExecutor(draft, (1 + rings * ring) * PAGE, MAX_NODES)
    assert run.rings == rings
    return run


@dataclass
class Writes:
    """Counts the rows of text that are written for windows."""

    run: LongExecutor
    rows: int = 0

    def __post_init__(self):
        self._write, self.run._write = self.run._write, self

    def __call__(self, tokens, positions, slots):
        self.rows += len(tokens)
        self._write(tokens, positions, slots)


DRAFTS = {
    "own format": {},
    "authors' of Llama": {"bias": False, "last_norm": False},
    "authors' of Qwen2": {"last_norm": False, "model_type": "qwen2"},
}


@pytest.mark.parametrize(
    ("name", "page", "gathered"),
    [
        *((name, 16, False) for name in DRAFTS),
        ("own format", 8, False),  # keys and values apart, as on a GPU
        ("own format", 32, False),
        ("own format", 16, True),
    ],
)
def test_logits_are_those_of_the_formulas(tmp_path, vocabulary, name, page, gathered):
    """Rounds of trees in a batch of lengths below, about and beyond the window."""
    folder = save_long(tmp_path, VOCAB, WINDOW, **DRAFTS[name])
    reference = Reference(folder, vocabulary.embedding, vocabulary.matrix)
    run = executor(folder, vocabulary)
    texts = Texts([2, 70, WINDOW + 1], page)
    run.read_from(pages_of(texts.store, gathered))
    names, rng = ["a", "b", "c"], np.random.default_rng(2)
    for _ in range(4):
        logits = texts.begin(run, names, [0, 1, 2])
        for r in range(3):
            torch.testing.assert_close(logits[r], texts.expected(reference, r, []), **CLOSE)
        first = torch.from_numpy(rng.integers(0, VOCAB, (3, 2)))
        logits = run.grow(torch.arange(3), first, torch.tensor([[-1, -1]] * 3))
        for r in range(3):
            for j in range(2):
                wanted = texts.expected(reference, r, [int(first[r, j])])
                torch.testing.assert_close(logits[r, j], wanted, **CLOSE)
        # One tree ends here.
        second = torch.from_numpy(rng.integers(0, VOCAB, (2, 2)))
        logits = run.grow(torch.tensor([0, 2]), second, torch.tensor([[1, 0], [1, 1]]))
        for a, (r, parents) in enumerate(((0, (1, 0)), (2, (1, 1)))):
            for j, parent in enumerate(parents):
                path = [int(first[r, parent]), int(second[a, j])]
                wanted = texts.expected(reference, r, path)
                torch.testing.assert_close(logits[a, j], wanted, **CLOSE)
        texts.lengths = texts.lengths + np.array([1, 17, 3])


def test_the_comparison_notices_what_is_left_out(tmp_path, vocabulary):
    """Of window and context both."""
    folder = save_long(tmp_path, VOCAB, WINDOW)
    reference = Reference(folder, vocabulary.embedding, vocabulary.matrix)
    run, texts = executor(folder, vocabulary), Texts([70], 16)
    run.read_from(pages_of(texts.store))
    logits = texts.begin(run, ["a"], [0])[0]
    torch.testing.assert_close(logits, texts.expected(reference, 0, []), **CLOSE)
    reference.window += 1
    assert not torch.allclose(logits, texts.expected(reference, 0, []), **CLOSE)
    reference.window -= 1
    texts.values[0, 0] += 1
    assert not torch.allclose(logits, texts.expected(reference, 0, []), **CLOSE)


def test_a_window_is_written_once(tmp_path, vocabulary):
    """And anew where its tokens are others: after a draft was rejected, or a text cut short."""
    folder = save_long(tmp_path, VOCAB, WINDOW)
    reference = Reference(folder, vocabulary.embedding, vocabulary.matrix)
    run, texts = executor(folder, vocabulary), Texts([70], 16)
    run.read_from(pages_of(texts.store))
    written = Writes(run)

    def rows_of_a_round() -> int:
        written.rows = 0
        logits = texts.begin(run, ["a"], [0])
        torch.testing.assert_close(logits[0], texts.expected(reference, 0, []), **CLOSE)
        return written.rows

    assert rows_of_a_round() == WINDOW
    texts.lengths += 1
    assert rows_of_a_round() == 0
    texts.lengths += 4
    assert rows_of_a_round() == 3
    texts.tokens[0, 60:68] = (texts.tokens[0, 60:68] + 1) % VOCAB
    assert rows_of_a_round() == 8
    texts.lengths -= 40
    assert rows_of_a_round() == WINDOW
    run.forget("a")
    assert rows_of_a_round() == WINDOW


def test_a_request_takes_the_ring_of_the_one_that_waits(tmp_path, vocabulary):
    folder = save_long(tmp_path, VOCAB, WINDOW)
    reference = Reference(folder, vocabulary.embedding, vocabulary.matrix)
    run, texts = executor(folder, vocabulary, rings=2), Texts([30, 40, 50], 16)
    run.read_from(pages_of(texts.store))
    assert [run.room(name) for name in "abc"] == [True, True, False]
    for rows in ([0, 1], [1, 2], [0, 2], [2, 1]):
        logits = texts.begin(run, ["abc"[r] for r in rows], rows)
        for a, r in enumerate(rows):
            torch.testing.assert_close(logits[a], texts.expected(reference, r, []), **CLOSE)


def test_memory_does_not_grow_with_the_text(tmp_path, vocabulary):
    """Of what is held nothing does, and of what is made nothing but the target's pages' numbers."""
    folder, made = save_long(tmp_path, VOCAB, WINDOW), {}
    for length in (100, 6000):
        run, texts = executor(folder, vocabulary), Texts([length], 16, most=6010)
        run.read_from(pages_of(texts.store))
        texts.begin(run, ["a"], [0])
        texts.lengths += 3
        with Largest() as largest:
            texts.begin(run, ["a"], [0])
            run.grow(torch.tensor([0]), torch.tensor([[1, 2]]), torch.tensor([[-1, -1]]))
            run.grow(torch.tensor([0]), torch.tensor([[1, 2]]), torch.tensor([[0, 1]]))
        held = sum(each.nbytes for each in run.cache._held.values())
        assert held == run.held_bytes()
        made[length] = held, largest.bytes
    assert made[100] == made[6000]


def test_a_draft_of_other_heads_than_its_targets_is_refused(tmp_path, vocabulary):
    run = executor(save_long(tmp_path, VOCAB), vocabulary)
    with pytest.raises(DraftModelError, match=r"4 heads of 16 units, .* 3 KV heads of 16"):
        run.read_from(pages_of(Texts([9], 16, kv_heads=3).store))


def test_memory_for_no_request_is_refused(tmp_path, vocabulary):
    draft = LongDraft(save_long(tmp_path, VOCAB), vocabulary, CPU, torch.float32)
    with pytest.raises(DraftModelError, match="has room for 64 positions of the draft, and one"):
        LongExecutor(draft, 64, MAX_NODES)


def test_beams_of_one_width_are_best_first_and_others_the_papers():
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(5, 2, 16, VOCAB, generator=generator).softmax(-1)
    greedy, none = torch.ones(2, dtype=torch.bool), torch.empty(2, 0)
    one, other = BestFirst(3, 3, greedy), Beams((3, 3, 3), greedy)
    for depth in range(3):
        level = q[depth, :, : 3 if depth else 1]
        mine, theirs = one.expand(level, none), other.expand(level, none)
        assert torch.equal(mine.tokens, theirs.tokens)
        assert torch.equal(mine.parents, theirs.parents)
    widths = (4, 16, 16)
    beams, likely = Beams(widths, greedy), torch.zeros(2, 1)
    for depth, width in enumerate(widths):
        level = q[depth, :, : likely.shape[1]]
        grown = beams.expand(level, none)
        # All extensions of all beams, of which the most probable are kept.
        likely, best = (likely[..., None] + level.log()).flatten(1).topk(width, -1)
        assert torch.equal(grown.tokens, best % VOCAB)
        assert torch.equal(grown.parents, best // VOCAB)
    tokens, parents, _ = beams.best(np.array([36, 5]))
    assert [len(each) for each in tokens] == [36, 5]
    assert all((above < np.arange(len(above))).all() for above in parents)


def edit(folder: str, drop: str = "", **tensors: torch.Tensor) -> None:
    path = Path(folder) / "model.safetensors"
    kept = {name: w.clone() for name, w in load_file(path).items() if name != drop}
    save_file(kept | tensors, path)


def edit_config(folder: str, **keys) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: (Path(f) / "config.json").unlink(), "it has no config.json"),
        (lambda f: (Path(f) / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda f: (Path(f) / "model.safetensors").unlink(), "holds no .safetensors file"),
        (lambda f: (Path(f) / "model.safetensors").write_text("x"), "is no safetensors file"),
        (lambda f: edit(f, "cross_attn.q_proj.weight"), "lacks cross_attn.q_proj.weight"),
        (lambda f: edit(f, **{"lm_head.weight": torch.ones(3)}), "unknown here: lm_head.weight"),
        (
            lambda f: edit(f, **{"norm.weight": torch.ones(3)}),
            r"norm.weight of shape \(3,\), and its config.json makes it \(64,\)",
        ),
        (lambda f: edit_config(f, quantization_config={"bits": 4}), "is quantized"),
        (lambda f: edit_config(f, model_type="gpt2"), "has a layer of type 'gpt2'"),
        (lambda f: edit_config(f, hidden_act="gelu"), "has the activation 'gelu'"),
        (lambda f: edit_config(f, num_key_value_heads=3), "heads, which 3 KV heads do not divide"),
        (lambda f: edit_config(f, hidden_size=None), "'hidden_size' None: it must be a whole"),
        (lambda f: edit_config(f, draft_window=-1), "'draft_window' -1: it must be a whole number"),
    ],
)
def test_drafts_that_cannot_run_are_refused(tmp_path, change, sentence):
    folder = save_long(tmp_path, VOCAB)
    change(folder)
    with pytest.raises(ValueError, match=sentence) as error:
        parse({"method": "long_draft", "model": folder})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"hidden_size": 65}, "of 64 hidden units, and this one has 65"),
        ({"vocab_size": 51}, "of 50 tokens, and this one has 51"),
        ({"tensor_parallel_size": 2}, "set tensor_parallel_size to 1"),
        ({"fp8_cache": True}, "set --kv-cache-dtype to bfloat16"),
        ({"keeps": 64}, "which keeps 64 tokens here"),
    ],
)
def test_targets_that_a_draft_cannot_be_run_for_are_refused(tmp_path, fields, sentence):
    config = parse({"method": "long_draft", "model": save_long(tmp_path, VOCAB)})
    fits = {"vocab_size": VOCAB, "hidden_size": HIDDEN}
    config.check_target(target(**fits))
    with pytest.raises(ValueError, match=sentence):
        config.check_target(target(**fits | fields))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"tree": [2, 3]}, r"'tree' \[2, 3\] makes 5 nodes \(at most 80\)"),
        ({"num_speculative_tokens": 12}, "makes 68 nodes"),
        ({"shape": "topk"}, "unknown key 'shape'"),
    ],
)
def test_wrong_keys_are_refused(tmp_path, keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse({"method": "long_draft", "model": save_long(tmp_path, VOCAB), **keys})
