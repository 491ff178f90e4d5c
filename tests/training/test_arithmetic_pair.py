"""The pair of models for arithmetic: what it reads, what it learns from, and when it is good."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from typer.testing import CliRunner

from vllm_specplus.arbitrage.steps import Writer, router_text
from vllm_specplus.bench.arithmetic import DIALECTS, answer, is_held_out, problems
from vllm_specplus.training import arithmetic
from vllm_specplus.training.arithmetic import Size, batches, prompt_of, shortcoming, steps_within
from vllm_specplus.training.data import labelled, language_of


@pytest.fixture(scope="module")
def tokenizer():
    return arithmetic.make_tokenizer()


def test_texts_come_back_as_they_went_in(tokenizer):
    """Questions to measure on too, answers of all dialects, and what routers read."""
    rng = random.Random(3)
    for problem in itertools.islice(problems(5, True), 40):
        for dialect in DIALECTS:
            text = answer(problem, rng, dialect)
            step, behind, _ = text.partition("\n\n")
            read = router_text(problem.text, [(Writer.TARGET, step + behind)], text)
            for each in (problem.text, text, read):
                ids = tokenizer.encode(each, add_special_tokens=False)
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == each


def test_a_chat_is_the_prompt_that_is_learnt(tokenizer):
    problem = next(problems(0, False))
    chat = [{"role": "user", "content": problem.text}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(text, add_special_tokens=False) == prompt_of(problem, tokenizer)


def test_only_answers_are_learnt(tokenizer):
    tokens, labels = next(batches(tokenizer, "plain", 0))
    assert tokens.shape == labels.shape
    assert len(tokens) == arithmetic.BATCH
    for row, own in zip(tokens, labels, strict=True):
        learnt = own >= 0
        assert row[learnt].equal(own[learnt])
        text = tokenizer.decode(row[learnt])
        assert text.endswith(arithmetic.END)
        assert "?" not in text
        question = tokenizer.decode(row[: int(learnt.nonzero()[0, 0])])
        assert question.endswith("?\n")
        assert not is_held_out(question.strip())


def test_steps_are_as_many_as_there_is_time_for(monkeypatch):
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(arithmetic.time, "perf_counter", lambda: next(clock))
    done = []
    assert steps_within(100.0, 1000, lambda: done.append(1)) == 50
    assert len(done) == 4


@pytest.mark.parametrize(
    ("target", "draft", "says"),
    [
        (0.7, 0.2, None),
        (0.95, 0.5, None),
        (0.69, 0.3, "the target is right 69% of the time, 70% are wanted"),
        (0.9, 0.6, "the draft is right 60% of the time, 20% to 50% are wanted"),
        (0.9, 0.1, "the draft is right 10% of the time"),
    ],
)
def test_a_pair_that_is_not_as_wanted_is_told(target, draft, says):
    found = shortcoming({"target": {"right": target}, "draft": {"right": draft}})
    assert found is None if says is None else found.startswith(says)


@pytest.mark.slow
def test_the_command_writes_models_that_can_be_read(tmp_path, monkeypatch):
    """Ones that have learnt nothing, which it says."""
    sizes = {name: Size(32, 1, 2, 1e-3, 0.5, "plain") for name in ("target", "draft")}
    monkeypatch.setattr(arithmetic, "SIZES", sizes)
    for name, value in (("BATCH", 4), ("LOOK", 2), ("EXAM", 4), ("LONGEST", 6), ("WORDS_OF", 500)):
        monkeypatch.setattr(arithmetic, name, value)
    import typer

    app = typer.Typer()
    app.command()(arithmetic.main)
    done = CliRunner().invoke(app, ["--out", str(tmp_path), "--minutes", "1"])
    assert done.exit_code == 1
    assert "the target is right 0% of the time" in done.output
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["target"]["asked"] == 4
    assert [entry["step"] for entry in log["draft"]["log"]] == [0, 1]
    language = language_of(tmp_path / "draft")
    assert language.prompt([{"role": "user", "content": "How?"}]) == "How?\n"
    # Errors are found by characters.
    ids, labels = labelled("3 + 4 = 8.", {"error": [8, 9]}, language)
    assert [label for label in labels if label != 1] == [0, -1]
    assert len(ids) == len(labels)


def test_right_answers_are_counted(tokenizer, monkeypatch):
    asked = list(itertools.islice(problems(0, True), 3))
    texts = [answer(problem, random.Random(0), "plain") for problem in asked]
    texts[1] = texts[1].replace("=", "= 1")
    written = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(arithmetic, "draw", lambda *_: written)
    assert arithmetic.right_answers(torch.nn.Identity(), tokenizer, asked) == 2
