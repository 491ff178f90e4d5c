"""Training the head of the acceptance rule ``judge``."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.tiny import CPU, batch_of, fit, save_target, setup
from vllm_specplus.samplers.judge import JudgeHead, read_head
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.recipes.judge import Judge, Settings, build
from vllm_specplus.training.texts import Text

#: Tokens that are wrong wherever they stand.
WRONG = frozenset(range(10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target whose states show what is wrong: those tokens have something in common."""
    made = save_target(tmp_path_factory.mktemp("target"), layers=1)
    weights = load_file(made / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= 0.1
    weights["model.embed_tokens.weight"][sorted(WRONG)] += 0.6
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    return made


def answers(count: int, seed: int) -> list[Text]:
    """Random ones, of which everything but the prompt and now and then a token is known."""
    rng = torch.Generator().manual_seed(seed)
    texts = []
    for i in range(count):
        tokens = tuple(torch.randint(96, (24,), generator=rng).tolist())
        known = [int(token not in WRONG) for token in tokens]
        known[:4], known[7] = [-1] * 4, -1
        texts.append(Text(f"a{seed}-{i}", tokens, 4, "given", tuple(known)))
    return texts


@pytest.mark.parametrize("states", ["before_norm", "after_norm"])
def test_a_head_learns_what_the_states_show(folder, tmp_path, states):
    """Both classes, though one of them is rare; on answers that it has not seen."""
    texts, unseen = answers(40, 0), answers(20, 1)
    recipe = build(folder, Settings(states=states, risk=0.3), setup(texts))
    assert recipe.measure(unseen).others["right_told"] == 0  # undecided
    losses = []
    fit(recipe, texts, 200, rate=0.1, seen=lambda figures: losses.append(figures["loss"]))
    assert losses[-1] < losses[0]
    found = recipe.measure(unseen)
    assert min(found.others["right_told"], found.others["wrong_told"]) > 0.85
    assert found.positions == 20 * 19
    assert (found.tvd_acceptance, found.by_depth) == (None, ())
    recipe.export(tmp_path)
    file = tmp_path / "head.safetensors"
    told = read_head(file)
    assert (told.size, told.before_norm) == (64, states == "before_norm")
    assert told.threshold == found.others["threshold"] == JudgeHead(str(file), CPU).threshold
    # What is served scores the row of the token itself.
    head = JudgeHead(str(file), CPU)
    read = recipe.target.states(batch_of(unseen), (1,))
    rows = (read.layers if states == "before_norm" else read.last)[:, 4:]
    right = head.scores(rows.reshape(-1, 64)) > 0.5
    truth = torch.tensor([int(token not in WRONG) for text in unseen for token in text.tokens[4:]])
    assert float((right == truth.bool()).float().mean()) > 0.85


def test_batches_lead_where_the_whole_does(folder):
    """To the loss of logistic regression on all tokens at once."""
    texts = answers(40, 0)
    whole, recipe = (build(folder, Settings(), setup(texts)) for _ in range(2))
    batch = batch_of(texts)
    optimizer = torch.optim.LBFGS(whole.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss(judge: Judge) -> float:
        for each in judge.parameters():
            each.grad = None
        penalty = Settings().decay * float(judge.weight.detach().square().sum())
        return judge.step(batch, 0.0, torch.Generator())["loss"] + penalty

    at_first = loss(recipe)
    optimizer.step(lambda: loss(whole))
    fit(recipe, texts, 400, rate=0.1)
    assert loss(whole) <= loss(recipe) < loss(whole) + 0.03 * (at_first - loss(whole))


def test_a_step_is_the_balanced_mean_by_hand(folder):
    texts = answers(3, 0)
    recipe = build(folder, Settings(decay=0.5, states="after_norm"), setup(texts))
    with torch.no_grad():
        recipe.weight += 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(0))
        recipe.bias += 0.3
    batch = batch_of(texts)
    figures = recipe.step(batch, 0.0, torch.Generator())
    found = recipe.weight.grad.clone()
    weight = recipe.weight.detach().clone().requires_grad_()
    states = recipe.target.states(batch).last
    seen = torch.stack([
        states[row, i]
        for row, text in enumerate(texts)
        for i, label in enumerate(text.labels)
        if label >= 0
    ])  # fmt: skip
    states = (states - seen.mean(0)) / seen.std(0, correction=0)
    labels = [label for text in texts for label in text.labels]
    right = labels.count(1) / (labels.count(1) + labels.count(0))
    total = 0.0
    for row, text in enumerate(texts):
        for i, label in enumerate(text.labels):
            valid = (states[row, i] @ weight + recipe.bias.detach()).sigmoid()
            if label == 1:
                total = total - 0.5 / right * valid.log()
            elif label == 0:
                total = total - 0.5 / (1 - right) * (1 - valid).log()
    mean = total / (3 * 20)
    (mean + 0.5 * weight.square().sum()).backward()
    assert figures["loss"] == pytest.approx(mean.item(), rel=1e-5)
    torch.testing.assert_close(found, weight.grad, atol=1e-5, rtol=1e-4)


def test_the_head_that_is_written_reads_states_as_they_are(folder):
    """It was learnt on standardised ones."""
    texts = answers(3, 0)
    recipe = build(folder, Settings(), setup(texts))
    fit(recipe, texts, 5)
    weight, bias = recipe.head()
    batch = batch_of(texts)
    rows = recipe.target.states(batch, (1,)).layers[:, 4:].reshape(-1, 64)
    standard = (rows - recipe._mean) / recipe._deviation
    torch.testing.assert_close(
        rows @ weight + bias, standard @ recipe.weight + recipe.bias, atol=1e-4, rtol=1e-4
    )


def test_risk_is_of_the_first_error_of_each_text(folder):
    """A threshold below all that is known of them accepts none; too few errors promise nothing."""
    texts = answers(40, 0)
    recipe = build(folder, Settings(risk=0.9), setup(texts))
    fit(recipe, texts, 50, rate=0.1)
    unseen = answers(10, 1)
    erring = sum(0 in text.labels for text in unseen)
    assert recipe.measure(unseen).others["errors"] == erring
    assert recipe.measure(unseen).others["errors_accepted_high"] <= 0.9
    strict = build(folder, Settings(risk=0.01), setup(texts))
    assert set(strict.measure(unseen).others) == {"right_told", "wrong_told"}


def test_without_balance_every_token_counts_alike(folder):
    texts, batch = answers(3, 0), batch_of(answers(3, 0))
    losses = [
        build(folder, Settings(balance=balance), setup(texts)).step(batch, 0.0, torch.Generator())
        for balance in (True, False)
    ]
    # Undecided, each token costs log 2, whatever its weight; the weights' mean is 1 in both.
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"])


def test_it_goes_on_from_a_checkpoint(folder):
    texts = answers(3, 0)
    first, second = (build(folder, Settings(), setup(texts)) for _ in range(2))
    fit(first, texts, 3)
    second.load_state({name: each.clone() for name, each in first.state().items()})
    assert second.weight.equal(first.weight)
    assert second.bias.equal(first.bias)
    assert isinstance(second, Judge)


def test_texts_of_which_nothing_is_known_teach_nothing(folder):
    recipe = build(folder, Settings(), setup(answers(2, 0)))
    silent = [Text("s", tuple(range(12)), 4, "given")]
    assert recipe.step(batch_of(silent), 0.0, torch.Generator())["loss"] == 0
    assert not recipe.weight.grad.any()
    assert recipe.measure(silent).others == {}


@pytest.mark.parametrize("label", [0, 1])
def test_both_kinds_are_needed(folder, label):
    texts = [Text("a", (1, 2, 3), 1, "given", (-1, label, label))]
    with pytest.raises(TrainingError, match="only one kind: give --data rows"):
        build(folder, Settings(), setup(texts))
