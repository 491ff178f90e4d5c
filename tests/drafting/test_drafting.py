"""The draft executor against transformers' own forward pass; tree shapes against plain
formulas."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

from tests.drafting.test_graphs import record_on_cpu
from tests.model_configs import target
from vllm_specplus.config import parse
from vllm_specplus.drafting import model as draft_model
from vllm_specplus.drafting.cache import PAGE, PagedCache
from vllm_specplus.drafting.executor import PROMPT_CHUNK, DraftExecutor
from vllm_specplus.drafting.graphs import Record
from vllm_specplus.drafting.noise import DraftNoise
from vllm_specplus.drafting.shapes import (
    BestFirst,
    ConstantBranching,
    IndependentPaths,
    StochasticBeam,
    draft_distribution,
    draw,
)

VOCAB = 96
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48,
}  # fmt: skip
#: Sizes of their own, beside those that all have.
FAMILIES: dict[str, dict] = {family: {} for family in draft_model.FAMILIES} | {
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "helium": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "mixtral": EXPERTS,
    "olmoe": EXPERTS,
    "glm4": {"head_dim": 16, "pad_token_id": 0},
    "phi3": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
    "qwen2_moe": EXPERTS,
    "qwen3": {"head_dim": 16},
    "qwen3_moe": EXPERTS | {"head_dim": 16},
    "seed_oss": {"head_dim": 16},
}


def save_draft(path, family="llama", layers=2, vocab=VOCAB, context=512, **keys) -> str:
    """A random draft of ``family`` in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    config = AutoConfig.for_model(
        family, vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        max_position_embeddings=context,
        **{"tie_word_embeddings": False} | FAMILIES[family] | keys,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> str:
    return save_draft(tmp_path_factory.mktemp("draft"))


def executor(
    folder: str, slots: int = 2000, max_nodes: int = 12, record: Record | None = None
) -> DraftExecutor:
    loaded = draft_model.DraftModel(folder, torch.device("cpu"), torch.float32)
    run = DraftExecutor(loaded, slots, max_nodes, record)
    run.warm_up((1, 2, 3), 4)
    return run


def logits_of(folder: str, text) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    # Its "sdpa" leaves out what caps the logits.
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return reference(torch.tensor([list(map(int, text))])).logits[0, -1]


@pytest.mark.parametrize(
    ("family", "record"), [*((family, None) for family in FAMILIES), ("llama", record_on_cpu)]
)
def test_logits_are_transformers_own(tmp_path, family, record):
    """Texts and trees, in a batch of different lengths, over rounds of different progress."""
    folder = save_draft(tmp_path, family)
    run = executor(folder, record=record)
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (1, 7, PAGE, PROMPT_CHUNK)]
    names = [f"r{i}" for i in range(len(texts))]
    for _ in range(3):
        assert all(run.room(name, len(text)) for name, text in zip(names, texts, strict=True))
        logits = run.begin(names, texts)
        for row, text in zip(logits, texts, strict=True):
            torch.testing.assert_close(row, logits_of(folder, text), atol=2e-5, rtol=1e-4)
        first = torch.from_numpy(rng.integers(0, VOCAB, (4, 2)))
        run.grow(torch.arange(4), first, torch.tensor([[-1, -1]] * 4))
        second = torch.from_numpy(rng.integers(0, VOCAB, (4, 3)))
        below = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
        run.grow(torch.arange(4), second, below)
        # Two trees end here; the numbers of their third level's nodes stay unused.
        third = torch.from_numpy(rng.integers(0, VOCAB, (2, 2)))
        third_below = torch.tensor([[2, 4], [3, 0]])
        logits = run.grow(torch.tensor([1, 3]), third, third_below)
        for a, r in enumerate((1, 3)):
            for j in range(2):
                path, node = [int(third[a, j])], int(third_below[a, j])
                if node >= 2:
                    path.append(int(second[r, node - 2]))
                    node = int(below[r, node - 2])
                path.append(int(first[r, node]))
                expected = logits_of(folder, [*texts[r], *reversed(path)])
                torch.testing.assert_close(logits[a, j], expected, atol=2e-5, rtol=1e-4)
        texts = [
            np.append(text, rng.integers(0, VOCAB, rng.integers(1, 4))).astype(np.int32)
            for text in texts
        ]


@pytest.mark.parametrize("family", draft_model.FAMILIES)
def test_windows_are_the_models(tmp_path, family):
    """Of some layers, of all, or of none whatever the config says, for texts below, about and
    beyond a window of 24 tokens."""
    keys = {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1}
    folder = save_draft(tmp_path, family, layers=4, **keys)
    run = executor(folder)
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (3, 23, 24, 25, 90)]
    names = [f"r{i}" for i in range(len(texts))]
    assert all(run.room(name, len(text)) for name, text in zip(names, texts, strict=True))
    logits = run.begin(names, texts)
    for row, text in zip(logits, texts, strict=True):
        torch.testing.assert_close(row, logits_of(folder, text), atol=1e-4, rtol=1e-4)
    chain = [torch.from_numpy(rng.integers(0, VOCAB, (len(texts), 1))) for _ in range(2)]
    for depth, tokens in enumerate(chain):
        parents = torch.full((len(texts), 1), depth - 1)
        logits = run.grow(torch.arange(len(texts)), tokens, parents)
    for r, text in enumerate(texts):
        expected = logits_of(folder, [*text, *(int(tokens[r, 0]) for tokens in chain)])
        torch.testing.assert_close(logits[r, 0], expected, atol=1e-4, rtol=1e-4)


def test_layers_of_another_kind_are_refused(tmp_path, monkeypatch):
    """Attention and MLP of the same input, as in Cohere's."""
    monkeypatch.setattr(draft_model, "FAMILIES", ("cohere",))
    monkeypatch.setitem(FAMILIES, "cohere", {"pad_token_id": 0})
    folder = save_draft(tmp_path, "cohere")
    with pytest.raises(ValueError, match=r"cannot be run layer by layer: CohereDecoderLayer|they"):
        draft_model.DraftModel(folder, torch.device("cpu"), torch.float32)


def test_a_text_that_changed_is_read_again(draft):
    """Resumed, or replaced under the same id: only the common beginning is believed."""
    run = executor(draft)
    text = np.arange(1, 60, dtype=np.int32)
    for changed in (text, text[:20], np.append(text[:30], [5, 6, 7]).astype(np.int32)):
        run.room("r", len(changed))
        torch.testing.assert_close(
            run.begin(["r"], [changed])[0], logits_of(draft, changed), atol=2e-5, rtol=1e-4
        )
    run.forget("r")
    assert run.cache.cached("r", text) == 0


class Unread(np.ndarray):
    """A text of which only what is beyond ``known`` may be looked at."""

    known = 0

    def __getitem__(self, at):
        if isinstance(at, slice) and (at.start or 0) < self.known and at.stop != 0:
            raise AssertionError("the whole text is read")
        return super().__getitem__(at)


def test_texts_of_one_version_are_not_compared():
    cache = PagedCache([0], 1, 1, 100, torch.float32, torch.device("cpu"))
    text = np.arange(1000, dtype=np.int32)
    cache.remember("r", text[:600], 3)
    for size in (603, 700, 1000):
        longer = text[:size].view(Unread)
        longer.known = cache.cached("r", longer, 3)
        cache.remember("r", longer, 3)
    assert cache.cached("r", longer, 3) == 1000
    with pytest.raises(AssertionError, match="whole"):  # the control: another version is compared
        cache.cached("r", longer, 4)


def test_texts_of_another_version_are_compared():
    cache = PagedCache([0], 1, 1, 100, torch.float32, torch.device("cpu"))
    text = np.arange(50, dtype=np.int32)
    cache.remember("r", text, 0)
    assert cache.cached("r", text[:40], 0) == 40
    cache.remember("r", text[:40], 0)
    cut = np.append(text[:30], [7, 7, 7, 7]).astype(np.int32)
    assert cache.cached("r", cut, 1) == 30
    cache.remember("r", cut, 1)
    assert cache.cached("r", np.append(cut, 1).astype(np.int32), 1) == 34
    assert cache.cached("r", text, None) == 30  # who knows nothing compares


def test_pages_are_owned_once():
    """Against sets: no page of two requests, none lost."""
    rng = np.random.default_rng(0)
    cache = PagedCache([0], 1, 1, 40, torch.float32, torch.device("cpu"))
    slots: dict[str, int] = {}
    for _ in range(300):
        name = f"r{rng.integers(6)}"
        if rng.random() < 0.3:
            cache.release(name)
            slots.pop(name, None)
        else:
            wanted = int(rng.integers(1, 12 * PAGE))
            if cache.reserve(name, wanted):
                slots[name] = max(slots.get(name, 0), -(-wanted // PAGE))
        if slots:
            table = cache.table(list(slots))
            owned = [set(row[row > 0].tolist()) for row in table]
            assert [len(pages) for pages in owned] == list(slots.values())
            assert len(set().union(*owned)) == sum(slots.values()) == 39 - len(cache._free)


def test_memory_is_bounded_and_comes_back(draft):
    run = executor(draft, slots=10 * PAGE, max_nodes=PAGE)
    assert run.room("a", 6 * PAGE)
    assert not run.room("b", 4 * PAGE)
    assert run.room("c", 2 * PAGE)
    run.forget("a")
    assert run.room("b", 4 * PAGE)
    assert not run.room("d", 255)  # its own context would not do
    for name in "bcd":
        run.forget(name)
    assert len(run.cache._free) == 10
    with pytest.raises(ValueError, match="at least 2 pages"):
        PagedCache([0], 1, 8, 1, torch.float32, torch.device("cpu"))


# -- shapes ---------------------------------------------------------------------------


def random_laws(rng, *shape):
    return torch.from_numpy(rng.dirichlet(np.full(shape[-1], 0.5), shape[:-1])).float()


def uniform(rng, requests, size):
    return torch.from_numpy(rng.random((requests, size)))


def test_draws_without_replacement():
    rng = np.random.default_rng(3)
    q = torch.tensor([0.4, 0.0, 0.35, 0.2, 0.05]).expand(40_000, 5)
    tokens, left = draw(q, torch.from_numpy(rng.random((len(q), 3))))
    law = q[0].numpy()
    for a, b, c in itertools.permutations(range(5), 3):
        drawn = float((tokens == torch.tensor([a, b, c])).all(-1).float().mean())
        expected = law[a] * law[b] / (1 - law[a]) * law[c] / (1 - law[a] - law[b])
        assert drawn == pytest.approx(expected, abs=0.01)
    assert all(len(set(row)) == 3 for row in tokens[:2000].tolist())
    torch.testing.assert_close(left[:, 1], 1 - q[0, tokens[:, 0]].double(), atol=1e-7, rtol=0)
    for certain in ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0]):
        both, left = draw(torch.tensor([certain]), torch.tensor([[0.3, 0.9]]).double())
        assert left.tolist() == [[1.0, 0.0]]
        assert certain[both[0, 0]] == 1
        assert both[0, 1] == both[0, 0]


def test_what_draws_and_what_judges_are_apart():
    """Generators of one seed repeat each other: with one draft of two nodes per step, the noise
    that judged a node then was the next step's first draw, and text was skewed (chi-square 300 at
    3 degrees of freedom in 400,000 steps)."""
    from vllm_specplus.engine.row_sampling import RuleSampler
    from vllm_specplus.samplers.sampled import WithoutReplacement

    cpu = torch.device("cpu")
    torch.manual_seed(0)  # as vLLM does
    streams = [
        DraftNoise(cpu)._generator,
        RuleSampler("raw_logprobs", WithoutReplacement(), cpu)._generator,
        torch.default_generator,
    ]
    assert len({each.initial_seed() for each in streams}) == len(streams)
    # A float64 takes two words of the generator, whose first one gives it its leading bits.
    words = [torch.rand(4000, generator=each)[::2] for each in streams]
    draws = DraftNoise(cpu).uniform(2000, [None], [()])[0]
    assert (words[0].double() * 8 % 1 - draws).abs().max() < 1e-5  # its own words do
    for other in words[1:]:
        assert abs(np.corrcoef(other.double() * 8 % 1, draws)[0, 1]) < 0.1


def test_stochastic_beams_have_the_papers_law():
    """Levels against the Gumbel formula over the whole vocabulary (algorithm card, H)."""
    rng = np.random.default_rng(0)
    width, vocab, runs = 2, 3, 60_000
    first = rng.dirichlet(np.ones(vocab))
    second = rng.dirichlet(np.ones(vocab), vocab)  # by the first token
    shape = StochasticBeam(width, 2, torch.zeros(runs, dtype=torch.bool))
    q = torch.from_numpy(first).float().expand(runs, 1, vocab)
    one = shape.expand(q, uniform(rng, runs, shape.noise_size(1)))
    q = torch.from_numpy(second).float()[one.tokens]
    two = shape.expand(q, uniform(rng, runs, shape.noise_size(width)))
    got = Counter(map(tuple, torch.cat([one.tokens, two.parents, two.tokens], 1).tolist()))

    phi = np.log(first) + np.zeros((runs, vocab))
    g = phi + rng.gumbel(size=phi.shape)
    order = np.argsort(-g, 1)[:, :width]  # of the root all G~ are shifted alike
    z = g.max(1, keepdims=True)
    nested = -np.log(1 - np.exp(-z) + np.exp(-np.take_along_axis(g, order, 1)))
    phi = np.log(first[order])[:, :, None] + np.log(second[order])
    g = phi + rng.gumbel(size=phi.shape)
    z = g.max(2, keepdims=True)
    inner = np.exp(-nested)[:, :, None] - np.exp(-z) + np.exp(-g)
    best = np.argsort(inner.reshape(runs, -1), 1)[:, :width]
    expected = Counter(map(tuple, np.concatenate([order, best // vocab, best % vocab], 1).tolist()))
    keys = got.keys() | expected.keys()
    distance = sum(abs(got[k] - expected[k]) for k in keys) / 2 / runs
    assert distance < 3 * np.sqrt(len(keys) / (np.pi * runs))


def test_a_greedy_request_among_sampled_ones_gets_the_ordinary_beam_search():
    rng = np.random.default_rng(2)
    laws = [random_laws(rng, 2, 1, 9), random_laws(rng, 2, 3, 9)]
    shape = StochasticBeam(3, 2, torch.tensor([True, False]))
    levels = [shape.expand(q, uniform(rng, 2, shape.noise_size(q.shape[1]))) for q in laws]
    beams = laws[0][0, 0].topk(3)
    assert levels[0].tokens[0].tolist() == beams.indices.tolist()
    best = (beams.values[:, None] * laws[1][0]).flatten().topk(3).indices
    assert levels[1].parents[0].tolist() == (best // 9).tolist()
    assert levels[1].tokens[0].tolist() == (best % 9).tolist()
    assert levels[0].tokens[1].tolist() != laws[0][1, 0].topk(3).indices.tolist()


def test_constant_branching():
    rng = np.random.default_rng(3)
    laws = [random_laws(rng, 2, 1, 6), random_laws(rng, 2, 2, 6)]
    shape = ConstantBranching((2, 1), torch.tensor([True, False]))
    levels = [shape.expand(q, uniform(rng, 2, shape.noise_size(q.shape[1]))) for q in laws]
    assert shape.sizes == (2, 2)
    assert levels[0].parents.tolist() == [[0, 0]] * 2
    assert levels[1].parents.tolist() == [[0, 1]] * 2
    assert levels[0].tokens[0].tolist() == laws[0][0, 0].topk(2).indices.tolist()
    assert levels[1].tokens[0].tolist() == laws[1][0].argmax(-1).tolist()


def test_independent_paths_share_their_beginnings():
    shape = IndependentPaths(3, 3, torch.zeros(1, dtype=torch.bool))
    # Paths draw 1, 0, 1: the third stands where the first does.
    first = shape.expand(
        torch.tensor([[[0.5, 0.5, 0.0]]]), torch.tensor([[0.7, 0.1, 0.9]]).double()
    )
    assert first.tokens.tolist() == [[1, 0, 1]]
    below = torch.tensor([[[0.2, 0.8, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]]])
    half = torch.full((1, 3), 0.5).double()
    level = shape.expand(below, half)
    assert level.parents.tolist() == [[0, 1, 0]]
    assert level.tokens.tolist() == [[1, 0, 1]]  # never from the third node's own law
    shape.select(torch.tensor([0]))
    assert shape.expand(below, half).parents.tolist() == [[0, 1, 0]]


def test_best_first_finds_the_most_probable_nodes():
    """All nodes of a full tree, ranked by the probability of their paths."""
    rng = np.random.default_rng(4)
    vocab, depth = 3, 3
    law = {(): rng.dirichlet(np.ones(vocab))}
    for d in range(1, depth):
        for path in [p for p in law if len(p) == d - 1]:
            law |= {(*path, v): rng.dirichlet(np.ones(vocab)) for v in range(vocab)}
    everything = {}
    for path, row in law.items():
        above = everything.get(path, 1.0)
        everything |= {(*path, v): above * row[v] for v in range(vocab)}
    greedy = torch.zeros(2, dtype=torch.bool)
    shape = BestFirst(vocab, depth, greedy)
    paths = [[()], [()]]
    for d in range(depth):
        if d == 2:  # the first tree ends with its second level
            shape.select(torch.tensor([1]))
            paths = paths[1:]
        q = torch.tensor(np.array([[law[p] for p in each] for each in paths])).float()
        level = shape.expand(q, torch.empty(len(q), 0))
        paths = [
            [(*each[p], t) for p, t in zip(places, tokens, strict=True)]
            for each, places, tokens in zip(
                paths, level.parents.tolist(), level.tokens.tolist(), strict=True
            )
        ]
    tokens, parents, given = shape.best(np.array([3, 6]))
    for r, (count, deepest) in enumerate(((3, 2), (6, 3))):
        got = []
        for token, parent in zip(tokens[r], parents[r], strict=True):
            got.append((*(got[parent] if parent >= 0 else ()), int(token)))
        allowed = [p for p in everything if len(p) <= deepest]
        best = sorted(allowed, key=lambda p: -everything[p])[:count]
        assert sorted(got) == sorted(best)
        above = [everything[p[:-1]] if len(p) > 1 else 1.0 for p in got]
        exact = [everything[p] / a for p, a in zip(got, above, strict=True)]
        assert given[r] == pytest.approx(exact, rel=1e-4)


def test_the_draft_law_truncates_like_the_target():
    logits = torch.log(torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])).expand(5, 1, 4)
    law = draft_distribution(
        logits,
        torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0]),
        torch.tensor([4, 4, 4, 2, 4]),
        torch.tensor([1.0, 1.0, 1.0, 1.0, 0.7]),
    )[:, 0]
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(law[0], torch.tensor([0.5, 0.3, 0.15, 0.05]))
    torch.testing.assert_close(law[1], squares / squares.sum())
    torch.testing.assert_close(law[2], law[0])  # greedy: read at temperature 1
    torch.testing.assert_close(law[3], torch.tensor([0.625, 0.375, 0, 0]))
    torch.testing.assert_close(law[4], torch.tensor([0.625, 0.375, 0, 0]))


# -- configuration ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"width": 5}, "must be a multiple of 'width' \\(5\\)"),
        ({"shape": "chain", "width": 1}, "shape 'chain' has no 'width'"),
        ({"branching": [2]}, "shape 'rsd_s' has no 'branching'"),
        ({"shape": "rsd_c", "branching": [2, 2]}, "makes 6 nodes"),
        ({"verification": "k_seq"}, "cannot be verified by 'k_seq' \\(allowed: traversal, rec"),
        ({"shape": "topk", "verification": "block"}, "leave verification out"),
        ({"model": "./nowhere"}, "'./nowhere' is not a Hugging Face folder"),
        ({"model": "nowhere"}, "'nowhere' is neither a folder nor in the Hugging Face cache"),
    ],
)
def test_mistakes_are_named(draft, keys, says):
    with pytest.raises(ValueError, match=says):
        parse({"method": "draft_tree", "model": draft, **keys})


def test_drafts_that_cannot_run_are_named(tmp_path, draft):
    def changed(**fields) -> str:
        folder = tmp_path / "-".join(fields)
        folder.mkdir()
        config = json.loads((tmp_path / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    save_draft(tmp_path)
    for fields, says in [
        ({"model_type": "gpt2"}, "of type 'gpt2' \\(supported: arcee, "),
        ({"quantization_config": {}, "x": 1}, "no .safetensors"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ]:
        with pytest.raises(ValueError, match=says):
            parse({"method": "draft_tree", "model": changed(**fields)})
    for size in (VOCAB - 1, VOCAB + 1):
        with pytest.raises(ValueError, match=f"has 96 token ids, the target {size}"):
            parse({"method": "draft_tree", "model": draft}).check_target(target(vocab_size=size))


def test_levels(draft):
    def levels(**keys):
        return parse({"method": "draft_tree", "model": draft, **keys}).levels()

    assert levels() == (3, 3, 3, 3)
    assert levels(shape="chain", num_speculative_tokens=2) == (1, 1)
    assert levels(shape="rsd_c", branching=[2, 2], num_speculative_tokens=6) == (2, 4)
