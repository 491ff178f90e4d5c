"""Training an EAGLE-3 head of a tiny target; what it computes, and what serving computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.drafting.test_drafting import VOCAB, save_draft
from vllm_specplus.config import parse
from vllm_specplus.drafting.eagle import EagleHead
from vllm_specplus.drafting.head_executor import HeadExecutor
from vllm_specplus.step import TargetRows
from vllm_specplus.training.batch import Batch, Batches, collate
from vllm_specplus.training.cost_model import Shape
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.frozen import Frozen
from vllm_specplus.training.recipe import Setup
from vllm_specplus.training.recipes import eagle3
from vllm_specplus.training.texts import Text

CPU, LAYERS, PAGE = torch.device("cpu"), 7, 8


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return Path(save_draft(tmp_path_factory.mktemp("target"), layers=LAYERS))


def texts(count: int = 16, seed: int = 0) -> list[Text]:
    """Random ones of 12 to 27 tokens, the first four of them prompt; most are of few tokens."""
    rng = np.random.default_rng(seed)
    lengths = 12 + rng.integers(0, 16, count)
    drawn = [rng.integers(0, 40 if i % 4 else VOCAB, n).tolist() for i, n in enumerate(lengths)]
    return [Text(str(i), tuple(tokens), 4, "given") for i, tokens in enumerate(drawn)]


def build(target: Path, given: list[Text] | None = None, dtype=torch.float32, **settings):
    setup = Setup(dtype, CPU, 0, given or texts())
    return eagle3.build(target, eagle3.Settings(**{"draft_vocabulary": 48} | settings), setup)


def train(recipe, given: list[Text], steps: int, rate: float = 3e-3) -> list[dict]:
    optimizer = torch.optim.AdamW(recipe.parameters(), lr=rate)
    batches, log = Batches(given, 200, 0), []
    for number in range(steps):
        batch = list(batches.epoch(number // len(batches)))[number % len(batches)]
        log.append(recipe.step(batch, number / steps, torch.Generator().manual_seed(number)))
        optimizer.step()
        optimizer.zero_grad()
    return log


@pytest.mark.slow
def test_a_tiny_head_learns_its_target(target):
    given = texts()
    recipe = build(target, given)
    frozen = {name: w.clone() for name, w in recipe.target.model.state_dict().items()}
    output = recipe.head.parts["lm_head"].weight.clone()
    before = recipe.measure(given)
    log = train(recipe, given, 100)
    after = recipe.measure(given)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert after.tvd_acceptance > before.tvd_acceptance + 0.1
    assert after.greedy_acceptance > before.greedy_acceptance + 0.1
    assert after.by_depth[1].rate > before.by_depth[1].rate
    assert all(torch.equal(frozen[n], w) for n, w in recipe.target.model.state_dict().items())
    assert torch.equal(recipe.head.parts["lm_head"].weight, output)


def test_bfloat16_learns_as_well(target):
    log = train(build(target, dtype=torch.bfloat16), texts(), 30)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]


def test_an_output_layer_that_is_learnt_changes(target):
    recipe = build(target, learn_output=True)
    output = recipe.head.parts["lm_head"].weight.detach().clone()
    train(recipe, texts(), 3)
    assert not torch.equal(recipe.head.parts["lm_head"].weight, output)


def naive_loss(recipe, batch: Batch, steps: int, decay: float) -> torch.Tensor:
    """The mean divergence over the positions to be learnt, by the steps' weights; one position
    after the other, each over all tokens of the head."""
    read, last = recipe.states(batch)
    known = recipe._vocabulary.ids
    shares = [decay**step for step in range(steps)]
    total = torch.zeros(())
    for row, text in enumerate(batch.texts):
        chains = eagle3.Chains(recipe.head, read[row : row + 1, : len(text.tokens) - 1])
        ys = [
            chains.step(eagle3.ahead(batch.tokens[row : row + 1, : len(text.tokens)], step))[0]
            for step in range(steps)
        ]
        for position in range(max(text.start - 1, 0), len(text.tokens) - 1):
            p = (last[row, position] @ recipe.target.output_weight[known].T).softmax(-1)
            for step in range(steps):
                if position - step - 1 >= 0:
                    q = recipe.head.logits(ys[step][position - step - 1])[known].log_softmax(-1)
                    total = total + shares[step] / sum(shares) * (p * (p.log() - q)).sum()
    return total / batch.learn.sum()


@pytest.mark.parametrize("keys", [{}, {"steps": 1}, {"step_decay": 0.5, "learn_output": True}])
def test_a_step_is_the_gradient_of_the_mean_loss(target, keys):
    recipe = build(target, **keys)
    batch = collate(
        [*texts(3), Text("short", (1, 2), 1, "given"), Text("all", (3, 4, 5), 0, "given")]
    )
    settings = recipe._settings
    expected = naive_loss(recipe, batch, settings.steps, settings.step_decay)
    expected.backward()
    naive = [weight.grad.clone() for weight in recipe.parameters()]
    for weight in recipe.parameters():
        weight.grad = None
    found = recipe.step(batch, 0.0, torch.Generator())
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert {f"loss {step}" for step in range(1, settings.steps + 1)} < found.keys()
    for weight, grad in zip(recipe.parameters(), naive, strict=True):
        torch.testing.assert_close(weight.grad, grad, atol=1e-4, rtol=1e-3)


def test_what_the_head_cannot_predict_is_reported(target):
    given = texts(4)
    recipe = build(target, given, draft_vocabulary=8)
    batch = collate(given)
    known = set(recipe._vocabulary.ids.tolist())
    written = [token for text in given for token in text.tokens[text.start :]]
    share = sum(token in known for token in written) / len(written)
    assert recipe.step(batch, 0.0, torch.Generator())["covered"] == pytest.approx(share)
    assert 0 < share < 1


def entering(recipe, tokens: list[int]) -> torch.Tensor:
    """[n, layers * hidden] of what enters the layers whose states the head reads, caught there."""
    caught, model = {}, recipe.target.model.model
    hooks = [
        model.layers[number].register_forward_pre_hook(
            lambda _, args, kwargs, number=number: caught.update(
                {number: args[0] if args else kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
        for number in recipe._layers
    ]
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return torch.cat([caught[number][0] for number in recipe._layers], -1)


class Served:
    """A written head as it is served behind one text, by the target's own states."""

    def __init__(self, recipe, folder: Path, tokens: list[int]):
        folder.mkdir()
        recipe.export(folder)
        head = EagleHead(str(folder), recipe.target, VOCAB, CPU, torch.float32)
        self.run = HeadExecutor(head, 6, max_requests=1, pages=20, page=PAGE)
        self.tokens = np.array([tokens], np.int32)
        states = entering(recipe, tokens)[:-1]
        rows = TargetRows(
            states=states, positions=np.arange(len(states)), starts=np.array([0, len(states)]),
            pages=np.arange(1, 12, dtype=np.int32)[None],
        )  # fmt: skip
        self.run.follow(["a"], self.tokens, rows)
        self.first = self.run.begin(["a"], np.arange(1), np.array([len(tokens)]))[0]

    def chain(self, depth: int) -> list[int]:
        """Greedily, level by level."""
        found, parent, logits = [], -1, self.first
        for level in range(depth):
            found.append(int(logits.argmax()))
            token = torch.tensor([[found[-1]]])
            logits = self.run.grow(torch.arange(1), token, torch.tensor([[parent]]))[0, 0]
            parent = level
        return found


@pytest.fixture
def trained(target):
    """A recipe whose weights are what is written of them."""
    recipe = build(target)
    train(recipe, texts(), 20)
    with torch.no_grad():
        for weight in recipe.head.parts.parameters():
            weight.copy_(weight.to(torch.bfloat16))
    return recipe


def test_logits_in_training_are_those_in_serving(tmp_path, trained):
    """The first step's and, for the chain of the text's own tokens, the second one's."""
    (text,) = texts(1, seed=3)
    batch = collate([text])
    read, _ = trained.states(batch)
    chains = eagle3.Chains(trained.head, read[:, :-1])
    known = trained._vocabulary.ids
    first, second = (
        trained._own_logits(chains.step(eagle3.ahead(batch.tokens, step))[0]) for step in range(2)
    )
    for length in (2, 9, 12):
        served = Served(trained, tmp_path / str(length), list(text.tokens[:length]))
        torch.testing.assert_close(served.first[known], first[length - 2], atol=2e-3, rtol=1e-3)
        token = torch.tensor([[text.tokens[length]]]) if length < len(text.tokens) else None
        if token is not None:
            grown = served.run.grow(torch.arange(1), token, torch.tensor([[-1]]))[0, 0]
            torch.testing.assert_close(grown[known], second[length - 2], atol=2e-3, rtol=1e-3)
            assert not torch.allclose(grown[known], first[length - 2], atol=0.1)
        rest = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, known, False)
        assert served.first[rest].eq(float("-inf")).all()


def test_the_measured_chains_are_those_that_are_served(tmp_path, trained):
    given = texts(3, seed=5)
    probe = trained.target.probe(given)
    paths, number, compared = trained.paths(probe), 0, set()
    for group in probe.groups:
        for row, place in zip(group.rows.tolist(), group.places.tolist(), strict=True):
            if number % 7 == 0:
                tokens = group.tokens[row, : place + 1].tolist()
                served = Served(trained, tmp_path / str(number), tokens)
                assert served.chain(paths.shape[2]) == paths[number, 0].tolist()
                compared.add(tuple(paths[number, 0].tolist()))
            number += 1
    assert len(compared) > 2


def test_behind_a_texts_first_token_no_head_drafts(trained):
    text = Text("a", (5, 6, 7), 0, "given")
    probe = trained.target.probe([text])
    paths = trained.paths(probe)
    places = probe.groups[0].places.tolist()
    assert paths[places.index(0)].eq(-1).all()
    assert paths[places.index(1)].ge(0).all()
    assert sum(len(pair[0]) for pair in trained.pairs(collate([text]))) == 1


def test_a_resumed_recipe_goes_on_as_if_it_had_not_stopped(target):
    """Its tensors and the generator of the step are all there is to it; noise is drawn from it."""
    batch = collate(texts(4))
    recipe, again = build(target, noise=0.2), build(target, noise=0.2)
    train(recipe, texts(), 5)
    before = recipe.step(batch, 0.5, torch.Generator().manual_seed(1))
    assert again.step(batch, 0.5, torch.Generator().manual_seed(1)) != before
    again.load_state({name: each.clone() for name, each in recipe.state().items()})
    assert again.step(batch, 0.5, torch.Generator().manual_seed(1)) == before
    assert recipe.step(batch, 0.5, torch.Generator().manual_seed(2)) != before


def test_a_whole_vocabulary_needs_no_output_layer(tmp_path, target):
    recipe = build(target, draft_vocabulary=4 * VOCAB)
    assert "lm_head" not in recipe.head.parts
    log = train(recipe, texts(), 20)
    assert log[-1]["loss"] < log[0]["loss"]
    recipe.export(tmp_path)
    assert parse({"method": "eagle_tree", "model": str(tmp_path)}).model == str(tmp_path)


@pytest.mark.parametrize(
    ("asked", "layers", "found"),
    [
        (None, 30, (2, 15, 27)), (None, 32, (2, 16, 29)), (None, 7, (2, 3, 4)),
        (None, 6, (0, 3, 5)), (None, 1, (0,)), ([1, 5], 6, (1, 5)),
    ],
)  # fmt: skip
def test_layers_are_those_that_vllm_takes(asked, layers, found):
    assert eagle3.layer_ids(asked, layers) == found


@pytest.mark.parametrize("asked", [[], [3, 2], [2, 2], [-1, 2], [2, 6]])
def test_layers_that_a_target_has_not_got_are_refused(asked):
    with pytest.raises(TrainingError, match="name layers from 0 to 5, each once and in ascending"):
        eagle3.layer_ids(asked, 6)


def test_a_target_of_another_family_is_refused(tmp_path):
    save_draft(tmp_path, family="gemma2")
    with pytest.raises(TrainingError, match="of type 'gemma2', and EAGLE heads are served for"):
        build(tmp_path)


def test_what_a_step_costs_is_what_there_is(target):
    """The parameters that are said to be trained are those of a head, but for its norms."""
    shape = Shape(LAYERS, 64, 96, 4, 2, 16, VOCAB, tied=False)
    for keys in ({}, {"learn_output": True}, {"layers": [1, 3]}):
        recipe = build(target, **keys)
        matrices = sum(each.numel() for each in recipe.parameters() if each.dim() == 2)
        cost = eagle3.work(shape, recipe._settings)
        assert cost.trained == matrices
        assert cost.feature_bytes == 2 * 64 * (1 + len(recipe._layers))


@pytest.mark.engine
def test_vllm_and_our_trees_accept_the_same_of_what_was_learnt(tmp_path):
    """Hidden states of vLLM's target, its own loader and runner of heads, and ours."""
    from tests.engine import harness
    from tests.engine.conftest import build_model
    from vllm_specplus.training.decoding import greedy_chains

    folder = build_model(tmp_path / "target", 64, 0.12)
    prompts = [[3 + (7 * i + j * j) % 61 for j in range(5 + 7 * i)] for i in range(8)]
    learner = Frozen.load(Path(folder), CPU, torch.float32)
    given = []
    for i, prompt in enumerate(prompts):
        tokens, first = torch.tensor([prompt]), torch.tensor([0])
        mask, last = torch.ones_like(tokens, dtype=torch.bool), torch.tensor([len(prompt) - 1])
        answer = greedy_chains(learner, tokens, mask, first, last, 100)[0].tolist()
        given.append(Text(str(i), (*prompt, *answer), len(prompt), "target"))
    recipe = build(Path(folder), given, draft_vocabulary=60)
    train(recipe, given, 150)
    recipe.export((tmp_path / "head").mkdir() or tmp_path / "head")
    engine = {
        "model": folder, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
        "max_model_len": 256, "enable_prefix_caching": False, "disable_log_stats": False,
    }  # fmt: skip
    params = {"temperature": 0.0, "max_tokens": 100, "ignore_eos": True, "detokenize": False}
    head = {"model": str(tmp_path / "head"), "num_speculative_tokens": 3}
    chain = {"method": "eagle_tree", "shape": "chain", "control": {"policy": "fixed"}}
    stock, tree = (
        harness.run(
            tmp_path, engine | {"speculative_config": each | head},
            [{"requests": [[prompt, params] for prompt in prompts]}],
        )
        for each in ({"method": "eagle3"}, chain)
    )  # fmt: skip
    assert harness.ids(tree) == harness.ids(stock)
    assert tree["accepted_per_position"] == stock["accepted_per_position"]
    # It has seen these very answers: a first token is mostly right, measured or served.
    steps = tree["counters"]["request_steps"]
    served = [accepted / steps for accepted in tree["accepted_per_position"]]
    measured = [depth.rate for depth in recipe.measure(given).by_depth]
    assert served[0] > 0.5
    assert served == pytest.approx(measured[:3], abs=0.15)
