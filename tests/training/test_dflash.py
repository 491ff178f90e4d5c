"""Training a DFlash head of a tiny target; what it computes, and what serving computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import block_heads
from tests.block_heads import Reference
from tests.drafting.test_drafting import VOCAB
from tests.training.test_eagle3 import train
from tests.training.tiny import CPU, save_target, setup, some_texts
from vllm_specplus.config import parse
from vllm_specplus.drafting.block_checkpoint import read_config
from vllm_specplus.drafting.block_executor import BlockExecutor
from vllm_specplus.drafting.block_heads import load_head
from vllm_specplus.step import TargetRows
from vllm_specplus.training.batch import Batch, collate
from vllm_specplus.training.blocks import Blocks, Lesson, draw_anchors
from vllm_specplus.training.cost_model import Shape
from vllm_specplus.training.decoding import greedy_chains
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.frozen import Frozen
from vllm_specplus.training.mixers import glance_share
from vllm_specplus.training.recipes import dflash
from vllm_specplus.training.texts import Text

PAGE = 8
CLOSE = {"atol": 2e-3, "rtol": 1e-3}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """Its heads are as large as those of the reference."""
    path = tmp_path_factory.mktemp("target")
    return save_target(path, layers=5, head_dim=block_heads.DIM)


@pytest.fixture(scope="module")
def answers(target) -> list[Text]:
    """What the target writes, behind prompts of four tokens."""
    model = Frozen.load(target, CPU, torch.float32)
    prompts = torch.tensor([text.tokens[:4] for text in some_texts(16)])
    rows, places = torch.arange(16), torch.full((16,), 3)
    chains = greedy_chains(model, prompts, torch.ones_like(prompts).bool(), rows, places, 18)
    every = torch.cat((prompts, chains), 1).tolist()
    return [Text(str(i), tuple(row[: 14 + i % 8]), 4, "target") for i, row in enumerate(every)]


def build(target: Path, given: list[Text], dtype=torch.float32, **settings) -> dflash.DFlashRecipe:
    keys = {"draft_vocabulary": 40, "block": 5} | settings
    return dflash.build(target, dflash.Settings(**keys), setup(given, dtype))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "keys"),
    [
        (torch.float32, {}), (torch.bfloat16, {"glancing": True}),
        (torch.float32, {"learn_mask": False}),
    ],
    ids=["float32", "bfloat16-glancing", "mask-of-the-target"],
)  # fmt: skip
def test_a_tiny_head_learns_its_target(target, answers, dtype, keys):
    recipe = build(target, answers, dtype, anchor_share=1.0, **keys)
    frozen = {name: w.clone() for name, w in recipe.target.model.state_dict().items()}
    output = recipe.head.parts["lm_head"].weight.clone()
    before = recipe.measure(answers)
    log = train(recipe, answers, 60)
    after = recipe.measure(answers)
    assert sum(each["loss"] for each in log[-5:]) < 0.6 * sum(each["loss"] for each in log[:5])
    assert after.greedy_acceptance > before.greedy_acceptance + 0.1
    assert after.by_depth[1].rate > before.by_depth[1].rate + 0.1
    assert all(torch.equal(frozen[n], w) for n, w in recipe.target.model.state_dict().items())
    assert torch.equal(recipe.head.parts["lm_head"].weight, output)


@pytest.mark.parametrize("glancing", [False, True])
def test_everything_that_is_trained_has_a_gradient_in_bfloat16(target, answers, glancing):
    """Of a first pass without gradient autocast would keep weights that have none."""
    recipe = build(target, answers, torch.bfloat16, glancing=glancing)
    recipe.step(collate(answers[:4]), 0.0, rng())
    assert all(weight.grad is not None and weight.grad.any() for weight in recipe.parameters())


def naive_loss(recipe, batch: Batch, anchors: torch.Tensor, loss: str) -> torch.Tensor:
    """The mean by the weights of the depths, one block after the other, each of a text alone."""
    states = recipe.target.states(batch, recipe._layers)
    known = recipe._vocabulary.ids.tolist()
    settings = recipe._settings
    total, weights = torch.zeros(()), 0.0
    for row, text in enumerate(batch.texts):
        blocks = Blocks(recipe.head, states.layers[row : row + 1, : len(text.tokens)])
        for anchor in (each for each in anchors[row].tolist() if each >= 0):
            held = [text.tokens[anchor], *[recipe._mask_token] * (settings.block - 1)]
            embedded = recipe._embed(torch.tensor([[held]]))
            logits = recipe.head.logits(blocks.rows(torch.tensor([[anchor]]), embedded)[0, 0])
            for depth in range(1, settings.block):
                if anchor + depth >= len(text.tokens):
                    break
                weight = float(np.exp(-(depth - 1) / settings.gamma))
                weights += weight
                log_q, token = logits[depth - 1].log_softmax(-1), text.tokens[anchor + depth]
                if loss == "hard_ce":
                    total = total - (weight * log_q[known.index(token)] if token in known else 0)
                else:
                    before = states.last[row, anchor + depth - 1]
                    p = recipe.target.output(before)[known].softmax(-1)
                    total = total + weight * (p * (p.log() - log_q)).sum()
    return total / weights


@pytest.mark.parametrize(
    "keys",
    [{}, {"loss": "forward_kl"}, {"gamma": 1.0, "anchor_share": 0.6, "draft_vocabulary": 20}],
)
def test_a_step_is_the_gradient_of_the_mean_loss(target, keys):
    texts = [
        *some_texts(3), Text("short", (1, 2), 1, "given"), Text("all", (3, 4, 5), 0, "given")
    ]  # fmt: skip
    recipe, batch = build(target, texts, **keys), collate(texts)
    settings = recipe._settings
    anchors = draw_anchors(batch.learn, settings.anchor_share, settings.anchors, rng())
    expected = naive_loss(recipe, batch, anchors, settings.loss)
    expected.backward()
    naive = [weight.grad.clone() for weight in recipe.parameters()]
    for weight in recipe.parameters():
        weight.grad = None
    found = recipe.step(batch, 0.0, rng())
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert {f"loss {depth}" for depth in range(1, settings.block)} < found.keys()
    for weight, grad in zip(recipe.parameters(), naive, strict=True):
        torch.testing.assert_close(weight.grad, grad, atol=1e-4, rtol=1e-3)


def test_glancing_shows_some_masks_and_learns_the_others(target, answers):
    recipe, batch = build(target, answers, glancing=True), collate(answers)
    lesson = recipe._lesson(batch, draw_anchors(batch.learn, 0.5, 99, rng()))
    states = recipe.target.states(batch, recipe._layers)
    blocks = Blocks(recipe.head, states.layers)
    best = recipe._best(recipe._read(blocks, lesson).flatten(0, 2)).view_as(lesson.truth)
    wrong = int((lesson.learn & (best != lesson.truth)).sum())
    glance = recipe._glance(blocks, lesson, 0.3, rng(1))
    shown = glance.tokens[..., 1:] != recipe._mask_token
    assert int(shown.sum()) == int(glance_share(0.3) * wrong) > 0
    assert glance.tokens[..., 1:][shown].equal(lesson.truth[shown])
    assert glance.tokens[..., 0].equal(lesson.tokens[..., 0])
    assert glance.learn.equal(lesson.learn & ~shown)
    # It is drawn from the step's generator, and what is shown tells the others something.
    assert recipe._glance(blocks, lesson, 0.3, rng(1)).tokens.equal(glance.tokens)
    assert not recipe._glance(blocks, lesson, 0.3, rng(2)).tokens.equal(glance.tokens)
    assert not torch.allclose(recipe._read(blocks, glance), recipe._read(blocks, lesson))


def test_what_the_head_cannot_predict_is_reported(target, answers):
    recipe, batch = build(target, answers, draft_vocabulary=8, anchor_share=1.0), collate(answers)
    lesson = recipe._lesson(batch, draw_anchors(batch.learn, 1.0, 99, rng()))
    there = torch.isin(lesson.truth[lesson.learn], recipe._vocabulary.ids)
    share = recipe.step(batch, 0.0, rng())["covered"]
    assert share == pytest.approx(float(there.float().mean()))
    assert 0 < share < 1


@pytest.fixture(scope="module")
def trained(target, answers) -> dflash.DFlashRecipe:
    """A recipe whose weights are what is written of them."""
    recipe = build(target, answers)
    train(recipe, answers, 20)
    with torch.no_grad():
        for weight in recipe.head.parts.parameters():
            weight.copy_(weight.to(torch.bfloat16))
    return recipe


def reference(recipe, folder: Path) -> Reference:
    """The formulas, with what was written in float32."""
    weights = load_file(folder / "model.safetensors")
    copy = folder / "float32"
    copy.mkdir()
    floats = {n: w.float() if w.is_floating_point() else w for n, w in weights.items()}
    save_file(floats, copy / "model.safetensors")
    (copy / "config.json").write_text((folder / "config.json").read_text())
    embedding = recipe.target.body.embed_tokens.weight
    return Reference(str(copy), embedding, recipe.target.output_weight)


def test_what_is_written_is_the_head_that_was_trained(tmp_path, trained, answers):
    """Its tensors, what our loader makes of them, and the formulas row by row."""
    trained.export(tmp_path)
    assert parse({"method": "block_tree", "model": str(tmp_path)}).folder == str(tmp_path)
    config = read_config(str(tmp_path))
    assert (config.kind, config.depth, config.layer_ids) == ("dflash", 4, trained._layers)
    assert config.body.causal == (False, False)
    assert config.body.windows == (None, None)
    loaded = load_head(str(tmp_path), trained.target, VOCAB, CPU, torch.float32)
    formulas = reference(trained, tmp_path)
    assert formulas.ids.equal(trained._vocabulary.ids)
    text = answers[5]
    states = trained.target.states(collate([text]), trained._layers).layers[0]
    run = BlockExecutor(loaded, 10, PAGE, max_requests=1)
    tokens = np.array([text.tokens], np.int32)
    pages = np.arange(1, 6, dtype=np.int32)[None]
    rows = TargetRows(
        states=states, positions=np.arange(len(states)), starts=np.array([0, len(states)]),
        pages=pages,
    )  # fmt: skip
    run.follow(["a"], tokens, rows)
    for anchor in (1, 4, 9):
        lesson = Lesson.of(collate([text]), torch.tensor([[anchor]]), 5, trained._mask_token)
        own = trained.head.logits(trained._read(Blocks(trained.head, states[None]), lesson))[0, 0]
        expected = formulas(list(text.tokens[: anchor + 1]), states[:anchor])
        torch.testing.assert_close(own, expected, **CLOSE)
        laws = run.draft(rows, np.arange(1), tokens[:, anchor], np.array([anchor + 1]), 40)
        for depth, logits in enumerate(own):
            # By the tokens' ids, as the logits are.
            order = np.argsort(laws.tokens[0, depth][laws.order[0, depth, 0]])
            given = torch.from_numpy(laws.given[0, depth, 0][order])
            torch.testing.assert_close(given, logits.log_softmax(-1).detach(), **CLOSE)


def test_the_measured_chains_are_those_of_the_formulas(tmp_path, trained, answers):
    trained.export(tmp_path)
    formulas, compared = reference(trained, tmp_path), set()
    probe = trained.target.probe(answers[:3])
    paths, number = trained.paths(probe)[:, 0], 0
    assert paths.shape == probe.truth.shape
    for group in probe.groups:
        for row, place in zip(group.rows.tolist(), group.places.tolist(), strict=True):
            if number % 5 == 0:
                tokens = group.tokens[row, : place + 1]
                read = trained.target.outputs(tokens[None], output_hidden_states=True)
                states = torch.cat([read.hidden_states[n] for n in trained._layers], -1)[0, :-1]
                best = formulas(tokens.tolist(), states).argmax(-1)
                chain = [*formulas.ids[best].tolist(), -1, -1]  # a block of four, of six depths
                assert paths[number].tolist() == chain
                compared.add(tuple(chain))
            number += 1
    assert len(compared) > 2


def test_what_is_measured_are_first_tokens_everywhere(tmp_path, trained, answers):
    trained.export(tmp_path)
    formulas, texts = reference(trained, tmp_path), answers[:2]
    batch = collate(texts)
    found = [torch.cat(each) for each in zip(*trained.pairs(batch), strict=True)]
    assert len(found[0]) == int(batch.learn.sum())
    states = trained.target.states(batch, trained._layers)
    # By blocks of anchors, within these by texts: all are in one.
    places = [(row, at) for row in range(2) for at in batch.learn[row].nonzero()[:, 0].tolist()]
    for number, (row, at) in list(enumerate(places))[::7]:
        own = formulas(list(texts[row].tokens[: at + 1]), states.layers[row, :at])[0]
        torch.testing.assert_close(found[1][number][formulas.ids], own, **CLOSE)
        expected = trained.target.output(states.last[row, at])
        torch.testing.assert_close(found[0][number], expected)
    rest = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, formulas.ids, False)
    assert found[1][:, rest].eq(float("-inf")).all()


def test_a_resumed_recipe_goes_on_as_if_it_had_not_stopped(target, answers):
    """Its tensors and the generator of the step are all there is to it."""
    recipe, again = (build(target, answers, glancing=True) for _ in range(2))
    batch = collate(answers[:4])
    train(recipe, answers, 5)
    before = recipe.step(batch, 0.5, rng(1))
    assert again.step(batch, 0.5, rng(1)) != before
    again.load_state({name: each.clone() for name, each in recipe.state().items()})
    assert again.step(batch, 0.5, rng(1)) == before
    assert recipe.step(batch, 0.5, rng(2)) != before
    assert {"mask_embedding", "fc.weight"} < recipe.state().keys()
    assert "lm_head.weight" not in recipe.state()


def test_a_whole_vocabulary_needs_no_output_layer(tmp_path, target, answers):
    recipe = build(target, answers, draft_vocabulary=4 * VOCAB)
    assert "lm_head" not in recipe.head.parts
    train(recipe, answers, 3)
    recipe.export(tmp_path)
    assert not {"lm_head.weight", "d2t", "t2d"} & load_file(tmp_path / "model.safetensors").keys()
    assert recipe.measure(answers[:2]).positions == int(collate(answers[:2]).learn.sum())


def test_vllm_reads_the_configuration(tmp_path, target, answers):
    """And the weights of a head whose mask is a token; that one it embeds as the target does."""
    from vllm.transformers_utils.configs.speculators import SpeculatorsConfig

    recipe = build(target, answers, learn_mask=False, mask_token=7)
    recipe.export(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert SpeculatorsConfig.extract_vllm_speculative_config(raw) == {
        "method": "dflash", "num_speculative_tokens": 4
    }  # fmt: skip
    config = SpeculatorsConfig.from_pretrained(tmp_path)
    assert config.architectures == ["DFlashDraftModel"]
    assert config.dflash_config == {
        "mask_token_id": 7, "target_layer_ids": [n - 1 for n in recipe._layers],
        "sample_from_anchor": False, "causal": False,
    }  # fmt: skip
    assert (config.draft_vocab_size, config.vocab_size, config.num_hidden_layers) == (40, VOCAB, 2)
    assert (config.head_dim, config.num_key_value_heads) == (block_heads.DIM, 2)
    assert "mask_embedding" not in load_file(tmp_path / "model.safetensors")
    held = torch.tensor([7, 3])
    assert recipe._embed(held).equal(recipe.target.embed(held))


def test_the_mask_is_a_rare_token():
    texts = [Text("a", (0, 1, 2, 2, 4), 2, "target"), Text("b", (0, 0, 4, 1), 1, "target")]
    assert dflash.rarest_token(texts, 6) == 5
    assert dflash.rarest_token(texts, 5) == 3
    assert dflash.rarest_token([Text("a", (0, 1, 1), 1, "target")], 2) == 0


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"mask_token": VOCAB}, rf"mask_token {VOCAB}: the target's ids end at {VOCAB - 1}"),
        ({"draft_layers": 9}, "draft_layers 9: .* has 5: set at most 5"),
        ({"layers": [9]}, "layers .9.: name layers from 0 to 4"),
        ({"loss": "hard"}, "unknown loss 'hard'"),
    ],
)
def test_mistakes_are_told(target, answers, keys, says):
    with pytest.raises(TrainingError, match=says):
        build(target, answers, **keys)


def test_a_target_of_another_family_is_refused(tmp_path, answers):
    folder = save_target(tmp_path, layers=2, family="gemma2")
    with pytest.raises(TrainingError, match="of type 'gemma2', and DFlash heads are trained for"):
        build(folder, answers)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_heads_of_the_other_families_start_as_their_layers(tmp_path, answers, family):
    """With what these have beside Llama's: biases, which a head has not, and norms of heads."""
    folder = save_target(tmp_path / "target", layers=3, family=family)
    recipe = build(folder, answers, layers=[0, 2])
    assert np.isfinite(recipe.step(collate(answers[:4]), 0.0, rng())["loss"])
    (tmp_path / "head").mkdir()
    recipe.export(tmp_path / "head")
    assert read_config(str(tmp_path / "head")).kind == "dflash"


def test_what_a_step_costs_is_what_there_is(target, answers):
    shape = Shape.of(target)
    for keys in ({}, {"draft_layers": 3, "layers": [1, 3]}):
        recipe = build(target, answers, **keys)
        cost = dflash.work(shape, recipe._settings)
        assert cost.trained == sum(each.numel() for each in recipe.parameters() if each.dim() == 2)
        assert cost.feature_bytes == 2 * 64 * (1 + len(recipe._layers))
    once = dflash.work(shape, dflash.Settings())
    assert dflash.work(shape, dflash.Settings(glancing=True)).multiplied > once.multiplied
    twice = dflash.Settings(anchor_share=0.5)
    assert dflash.work(shape, twice).losses == 2 * once.losses
