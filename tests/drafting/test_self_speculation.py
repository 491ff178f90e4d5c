"""Drafting with the target's layers, against transformers' forward pass of the same layers."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests.drafting.test_drafting import VOCAB, save_draft
from tests.model_configs import target
from vllm_specplus.config import parse
from vllm_specplus.drafting.cache import PAGE
from vllm_specplus.drafting.executor import DraftExecutor
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.drafting.self_speculation import WINDOW, SelfDraftExecutor
from vllm_specplus.drafting.skip_search import Skips

LAYERS = 5
SKIPS = {
    "nothing": Skips(),
    "some": Skips(frozenset({1, 3}), frozenset({2, 3})),
    "after two": Skips.above(2, LAYERS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_draft(tmp_path_factory.mktemp("target"), layers=LAYERS)


def load(folder: str) -> DraftModel:
    return DraftModel(folder, torch.device("cpu"), torch.float32)


class FakeTarget:
    """The served model's cache: what an executor that skips nothing computed."""

    def __init__(self, folder: str, texts: list[np.ndarray]):
        self._exact = DraftExecutor(load(folder), 4000, 1)
        self._names = [f"t{i}" for i in range(len(texts))]
        for name, text in zip(self._names, texts, strict=True):
            self._exact.room(name, len(text))
        self._exact.begin(self._names, texts)
        self.read_positions = 0

    def __call__(self, requests, positions):
        cache = self._exact.cache
        self.read_positions += len(positions)
        table = cache.table(self._names)
        slots = table[requests, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
        for layer in cache.layers:
            yield cache.read(layer, torch.from_numpy(slots))


def reference_logits(folder: str, text, skips: Skips) -> torch.Tensor:
    """[V] behind the last token, whose pass skips; all before it is exact."""
    model = load(folder)
    exact = DraftExecutor(model, 1000, 1)
    exact.room("r", len(text))
    if len(text) > 1:
        exact.begin(["r"], [text[:-1]])
    run = SelfDraftExecutor(model, 16, 1)
    run.cache, run.skips = exact.cache, skips
    hidden = run._read(run.cache.table(["r"]), [text], [(0, len(text) - 1, len(text))])
    return model.logits(hidden)[0]


def started(folder, texts, skips) -> tuple[SelfDraftExecutor, list[str], FakeTarget]:
    run = SelfDraftExecutor(load(folder), 4000, 6)
    run.skips = skips
    names = [f"r{i}" for i in range(len(texts))]
    fake = FakeTarget(folder, texts)
    assert all(run.room(name, len(text)) for name, text in zip(names, texts, strict=True))
    run.follow(names, texts, np.arange(len(texts)), fake)
    return run, names, fake


def cached(run: SelfDraftExecutor, name: str, text: np.ndarray) -> list[torch.Tensor]:
    """Keys and values of all layers, of all of the text that the target has computed."""
    here = np.arange(len(text) - 1)
    slots = run.cache.table([name])[0][here // PAGE].astype(np.int64) * PAGE + here % PAGE
    slots = torch.from_numpy(slots)
    return [each for layer in run.cache.layers for each in run.cache.read(layer, slots)]


def random_texts(rng, *lengths) -> list[np.ndarray]:
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in lengths]


@pytest.mark.parametrize("skips", SKIPS.values(), ids=SKIPS)
def test_the_first_node_builds_on_what_the_target_computed(folder, skips):
    rng = np.random.default_rng(0)
    texts = random_texts(rng, 1, 5, PAGE + 1, 70)
    run, names, fake = started(folder, texts, skips)
    for _ in range(3):
        logits = run.begin(names, texts)
        for row, text in zip(logits, texts, strict=True):
            expected = reference_logits(folder, text, skips)
            torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-4)
        # A tree, whose keys and values must not outlive it.
        run.grow(torch.arange(4), torch.zeros(4, 3, dtype=torch.int64), torch.full((4, 3), -1))
        longer = [np.append(text, rng.integers(0, VOCAB, 3)).astype(np.int32) for text in texts]
        texts = longer
        fake = FakeTarget(folder, texts)
        assert all(run.room(name, len(text)) for name, text in zip(names, texts, strict=True))
        run.follow(names, texts, np.arange(4), fake)
        assert fake.read_positions == 4 * 3


def test_left_early_it_is_the_model_cut_short(folder):
    """Whole drafts, not only the first node: early layers are exact in nodes too."""
    from transformers import AutoModelForCausalLM

    cut = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cut.model.layers = cut.model.layers[:2]
    (text,) = random_texts(np.random.default_rng(1), 40)
    run, names, _ = started(folder, [text], SKIPS["after two"])
    logits, path = run.begin(names, [text])[0], []
    for depth in range(4):
        with torch.inference_mode():
            whole = torch.tensor([[*map(int, text), *path]])
            expected = cut(whole).logits[0, -1]
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
        path.append(int(logits.argmax()))
        logits = run.grow(
            torch.tensor([0]), torch.tensor([[path[-1]]]), torch.tensor([[depth - 1]])
        )[0, 0]


@pytest.mark.slow
def test_a_replay_counts_right_first_nodes_and_touches_no_text(folder):
    rng = np.random.default_rng(2)
    texts = random_texts(rng, 9, 30, WINDOW + 20)
    starts = np.array([4, 1, 2])
    skips, exits = SKIPS["some"], [1, 3, LAYERS]
    # Answers that are right now and then: plant what the candidates predict.
    for r, text in enumerate(texts):
        for i in range(starts[r], len(text), 3):
            cut = Skips.above(3, LAYERS)
            both = Skips(skips.attention | cut.attention, skips.mlp | cut.mlp)
            text[i] = int(reference_logits(folder, text[:i], both).argmax())
    run, names, _ = started(folder, texts, Skips())
    before = {name: cached(run, name, text) for name, text in zip(names, texts, strict=True)}
    right, seen = run.replay(names, texts, starts, skips, exits)
    expected, count = np.zeros(len(exits), int), 0
    for start, text in zip(starts, texts, strict=True):
        for i in range(max(start, len(text) - WINDOW), len(text)):
            count += 1
            for e, layers in enumerate(exits):
                cut = Skips.above(layers, LAYERS)
                both = Skips(skips.attention | cut.attention, skips.mlp | cut.mlp)
                expected[e] += int(reference_logits(folder, text[:i], both).argmax()) == text[i]
    assert right.tolist() == expected.tolist()
    assert seen == count == 5 + 29 + WINDOW
    assert right[1] >= 20 > right[0]
    for name, text in zip(names, texts, strict=True):
        for now, then in zip(cached(run, name, text), before[name], strict=True):
            assert torch.equal(now, then)


def test_a_replay_in_line_is_one_reading_by_the_candidate(folder):
    """SWIFT's trial: behind exact keys and values, all tokens by the layers that are kept; in the
    middle of texts, which stay as they are."""
    rng = np.random.default_rng(4)
    texts = random_texts(rng, 20, PAGE + 9, 7)
    starts, ends = np.array([5, 3, 6]), np.array([15, 3, 7])  # the second one: nothing
    skips = SKIPS["some"]
    model = load(folder)
    expected = 0
    for text, start, end in zip(texts, starts, ends, strict=True):
        if start == end:
            continue
        exact = DraftExecutor(model, 1000, 1)
        exact.room("r", len(text))
        exact.begin(["r"], [text[: start - 1]])
        run = SelfDraftExecutor(model, 16, 1)
        run.cache, run.skips = exact.cache, skips
        hidden = run._read(run.cache.table(["r"]), [text], [(0, start - 1, end - 1)])
        best = model.logits(hidden).argmax(-1).numpy()
        text[start] = best[0]  # right at least there
        expected += int((best == text[start:end]).sum())
    run, names, _ = started(folder, texts, Skips())
    before = {name: cached(run, name, text) for name, text in zip(names, texts, strict=True)}
    (right,), seen = run.replay(names, texts, starts, skips, [LAYERS], ends, in_line=True)
    assert seen == 10 + 1
    assert right == expected
    for name, text in zip(names, texts, strict=True):
        for now, then in zip(cached(run, name, text), before[name], strict=True):
            assert torch.equal(now, then)


def test_every_request_is_left_where_it_should_be(folder):
    """One pass for all: as each by itself, on text and in its tree."""
    texts = random_texts(np.random.default_rng(5), 12, 30, 9)
    run, names, _ = started(folder, texts, Skips())
    run.exits = np.array([2, 4, 2])
    together = [run.begin(names, texts)]
    active = torch.tensor([1, 2])
    tokens, parents = torch.tensor([[5, 6], [7, 8]]), torch.full((2, 2), -1)
    together.append(run.grow(active, tokens, parents))
    for r, layers in enumerate(run.exits.tolist()):
        alone, (name,), _ = started(folder, [texts[r]], Skips.above(layers, LAYERS))
        own = alone.begin([name], [texts[r]])
        torch.testing.assert_close(together[0][r], own[0], atol=2e-5, rtol=1e-4)
        if r:
            own = alone.grow(torch.tensor([0]), tokens[r - 1 : r], parents[:1])
            torch.testing.assert_close(together[1][r - 1], own[0], atol=2e-5, rtol=1e-4)


def test_layers_that_never_run_are_not_copied(folder):
    (text,) = random_texts(np.random.default_rng(6), 25)
    model = load(folder)
    model.attention_layers = [0, 1]
    run = SelfDraftExecutor(model, 1000, 6)
    run.skips = SKIPS["after two"]
    assert run.room("r0", len(text))
    run.follow(["r0"], [text], np.arange(1), FakeTarget(folder, [text]))
    assert run.cache.layers == [0, 1]
    whole, _, _ = started(folder, [text], SKIPS["after two"])
    torch.testing.assert_close(run.begin(["r0"], [text]), whole.begin(["r0"], [text]))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"method": "layer_skip", "skip_share": 1.0}, "'skip_share' is 1.0"),
        ({"method": "layer_skip", "skip_mlp": [-1]}, "'skip_mlp.0' is -1"),
        (
            {"method": "layer_skip", "skip_mlp": [1], "skip_share": 0.3},
            "'skip_share' is for the search, and 'skip_mlp' says what to leave out",
        ),
        ({"method": "layer_skip", "model": "x"}, "unknown key 'model'"),
        ({"method": "early_exit", "exit_layers": [3, 2]}, "name each once, ascending"),
        ({"method": "early_exit", "exit_layers": []}, "'exit_layers' is []"),
        ({"method": "early_exit", "num_speculative_tokens": 10}, "multiple of 'width' (3)"),
        (
            {"method": "layer_skip", "skip_mlp": [1], "search": "swift"},
            "'search' is for the search, and 'skip_mlp' says what to leave out",
        ),
        ({"method": "layer_skip", "skips": "/nowhere"}, "'skips' '/nowhere' is not a file"),
        (
            {"method": "layer_skip", "stop": {"rule": "confidence"}},
            "'stop' ends drafts of one path, and shape 'topk' has several",
        ),
        (
            {"method": "layer_skip", "shape": "chain", "stop": {"rule": "tau"}},
            "'stop' by the rule 'tau' is not for method 'layer_skip' (allowed: "
            "adaptive_confidence, confidence)",
        ),
        (
            {
                "method": "early_exit",
                "shape": "chain",
                "stop": {"rule": "tau"},
                "statistics": "replay",
            },
            "set 'statistics' to 'verification'",
        ),
    ],
)
def test_mistakes_in_the_config(keys, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse(keys)


@pytest.mark.parametrize(
    ("keys", "fields", "words"),
    [
        ({"method": "layer_skip"}, {"num_layers": 2}, "the target has 2"),
        (
            {"method": "layer_skip", "skip_mlp": [2, 4]},
            {},
            "is [2, 4], and this target allows 0 to 3",
        ),
        (
            {"method": "early_exit", "exit_layers": [4]},
            {},
            "is [4], and this target allows 1 to 3",
        ),
        (
            {"method": "early_exit", "statistics": "verification"},
            {"gives_layers": lambda: False},
            "vLLM hands out no hidden states of a target of type 'llama'",
        ),
        (
            {"method": "rasd", "sources": ["token_recycling", "early_exit"]},
            {"fp8_cache": True},
            "method 'early_exit' reads the target's keys and values as they were computed",
        ),
    ],
)
def test_a_target_it_cannot_draft_with(keys, fields, words):
    config = parse(keys)
    config.check_target(target(num_layers=8, tensor_parallel_size=2))
    with pytest.raises(ValueError, match=re.escape(words)):
        config.check_target(target(**fields))


def test_a_file_says_what_to_leave_out(tmp_path):
    file = tmp_path / "skips.json"
    file.write_text('{"skip_attention": [1, 2], "skip_mlp": [2], "tokens_per_s": 3.0}')
    config = parse({"method": "layer_skip", "skips": str(file)})
    assert config.named_layers() == {"skip_attention": [1, 2], "skip_mlp": [2]}
    config.check_target(target(num_layers=8))
    with pytest.raises(ValueError, match="allows 0 to 1"):
        config.check_target(target(num_layers=2))
    with pytest.raises(ValueError, match="'skips' and 'skip_mlp' both say"):
        parse({"method": "layer_skip", "skips": str(file), "skip_mlp": [1]})
    file.write_text('{"skip_attention": [1, 1], "skip_mlp": []}')
    with pytest.raises(ValueError, match="it must be a list of layers, each once"):
        parse({"method": "layer_skip", "skips": str(file)})
