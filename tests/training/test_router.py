"""Training who decides on a draft's steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.training import toy
from tests.training.tiny import batch_of, fit, quieten, save_target, setup
from vllm_specplus.training.data import language_of, read_data
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.recipes.router import Settings, build
from vllm_specplus.training.texts import Text

#: A step with one of them is to be escalated.
WRONG = frozenset(range(10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_target(tmp_path_factory.mktemp("base"), layers=1)


def steps(count: int, seed: int) -> list[Text]:
    """Texts whose label says whether their last token is one of those."""
    rng = torch.Generator().manual_seed(seed)
    texts = []
    for i in range(count):
        tokens = torch.randint(96, (9 + i % 4,), generator=rng).tolist()
        if i % 3 == 0:
            tokens[-1] %= 10
        label = int(tokens[-1] in WRONG)
        labels = (*[-1] * (len(tokens) - 1), label)
        texts.append(Text(f"s{seed}-{i}", tuple(tokens), 3, "given", labels))
    return texts


@pytest.mark.slow
def test_a_router_learns_what_the_last_token_shows(folder):
    texts, unseen = steps(2400, 0), steps(60, 1)
    recipe = build(folder, Settings(), setup(texts))
    quieten(recipe.module)
    assert recipe.measure(unseen).others["escalated_told"] == 0  # it says nothing yet
    fit(recipe, texts, 60, rate=1e-2)
    found = recipe.measure(unseen)
    assert found.positions == 60
    assert min(found.others.values()) > 0.9
    assert (found.tvd_acceptance, found.by_depth) == (None, ())


def test_a_step_is_the_mean_by_hand(folder):
    texts = steps(4, 0)
    recipe = build(folder, Settings(), setup(texts))
    torch.nn.init.normal_(recipe.module.score.weight)
    loss = recipe.step(batch_of(texts), 0.0, torch.Generator())["loss"]
    total = 0.0
    with torch.no_grad():
        for text in texts:
            # As transformers' own classifier reads a text alone.
            logits = recipe.module(input_ids=torch.tensor([text.tokens])).logits[0]
            total -= float(logits.log_softmax(-1)[text.labels[-1]])
    assert loss == pytest.approx(total / sum(len(text.tokens) - 3 for text in texts), rel=1e-5)


def test_the_head_alone_changes_nothing_else(folder):
    texts = steps(40, 0)
    recipe = build(folder, Settings(learn="head"), setup(texts))
    assert list(recipe.state()) == ["score.weight"]
    before = recipe.module.model.layers[0].mlp.up_proj.weight.clone()
    fit(recipe, texts, 5)
    assert recipe.module.model.layers[0].mlp.up_proj.weight.equal(before)
    assert recipe.module.score.weight.any()


def test_labels_are_as_frequent_in_an_epoch(folder):
    texts = steps(60, 0)
    recipe = build(folder, Settings(), setup(texts))
    first, again, second = (recipe.texts_for(epoch, texts) for epoch in (0, 0, 1))
    assert first == again != second
    labels = [text.labels[-1] for text in first]
    rarer = min(sum(text.labels[-1] == kind for text in texts) for kind in (0, 1))
    assert labels.count(0) == labels.count(1) == rarer
    assert build(folder, Settings(balance=False), setup(texts)).texts_for(0, texts) is None


def test_what_is_written_is_read_as_it_was_learnt(folder, tmp_path):
    """By transformers, and by the arbiter in its process, from text."""
    from transformers import AutoModelForSequenceClassification

    texts = steps(40, 0)
    recipe = build(folder, Settings(), setup(texts))
    fit(recipe, texts, 5)
    recipe.export(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(model).__name__ == "LlamaForSequenceClassification"
    tokens = torch.tensor([texts[0].tokens])
    with torch.no_grad():
        assert model(input_ids=tokens).logits.equal(recipe.module(input_ids=tokens).logits)
    # A result can be trained on: its outputs are kept.
    assert build(tmp_path, Settings(), setup(texts)).module.score.weight.any()


def test_the_arbiter_reads_it(tmp_path):
    import asyncio

    from vllm_specplus.arbitrage.engines import EngineError
    from vllm_specplus.arbitrage.local import LocalClassifier

    base = save_target(tmp_path / "base", layers=1)
    toy.save_tokenizer(base)
    texts = steps(40, 0)
    recipe = build(base, Settings(), setup(texts))
    fit(recipe, texts, 5)
    recipe.export(tmp_path)
    router = LocalClassifier(tmp_path)
    text = "what is a young vampire"
    tokens = language_of(base).tokenizer(text)["input_ids"]
    with torch.no_grad():
        right = recipe.module(input_ids=torch.tensor([tokens])).logits[0].softmax(-1)[1]
    assert asyncio.run(router.probability(text)) == pytest.approx(float(right), abs=1e-6)
    with pytest.raises(EngineError, match="cannot be loaded"):
        LocalClassifier(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ((-1, 1, -1), "1 of 1 texts have no label at their end: bring rows of"),
        ((), "1 of 1 texts have no label at their end"),
        ((-1, -1, 1), "have all the same label"),
    ],
)
def test_texts_must_be_steps_of_both_kinds(folder, labels, words):
    with pytest.raises(TrainingError, match=words):
        build(folder, Settings(), setup([Text("a", (1, 2, 3), 1, "given", labels)]))


ROW = {
    "id": "x", "problem": "what is a", "steps": [{"writer": "target", "text": "b\n\n"}],
    "candidate": "c\n\n", "draft_score": 0.25, "target_score": 0.5,
}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    language = language_of(toy.save_target(tmp_path / "target"))

    def read(row: dict):
        path = tmp_path / "steps.jsonl"
        path.write_text(json.dumps(row))
        return read_data(path, language, toy.NOBODY), language

    return read


@pytest.mark.parametrize(("score", "label"), [(0.5, 1), (0.25, 0), (0.1, 0)])
def test_rows_of_steps(read, score, label):
    """The label is whether the target's step is the better one."""
    data, language = read(ROW | {"target_score": score})
    (text,) = data.texts
    wanted = "what is a\nModel 1: b\n\nModel 0: c\n\n"
    assert list(text.tokens) == language.tokenizer(wanted)["input_ids"]
    assert text.labels == (*[-1] * (len(text.tokens) - 1), label)
    assert text.start == 3
    assert data.wordings == ["what is a"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": "b"}, "line 1: the step: 'steps' is 'b'"),
        ({"steps": [{"writer": "me", "text": "b"}]}, "'steps.0.writer' is 'me'"),
        ({"target_score": None}, "'target_score' is None"),
        ({"scores": 1}, "unknown key 'scores'"),
        ({"problem": ""}, "'problem' is ''"),
    ],
)
def test_rows_that_are_no_steps(read, change, words):
    with pytest.raises(TrainingError, match=words):
        read(ROW | change)
