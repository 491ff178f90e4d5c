"""The loop: it learns, goes on after being killed as if it had not been, and says what is wrong."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import pytest
import torch

from tests.training.toy import WORDS, Settings, Toy, status, texts, train, trainer
from vllm_specplus.training import folder as folders
from vllm_specplus.training.curve import Curve
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.folder import RunFolder
from vllm_specplus.training.splits import committed
from vllm_specplus.training.texts import Text
from vllm_specplus.training.trainer import Plan

PLAN = {"epochs": 3, "batch_tokens": 64, "learning_rate": 0.1, "seed": 3}
EVERY_STEP = PLAN | {"checkpoint_seconds": 0.0}
#: Of one epoch over the toy's texts.
STEPS = 8


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in Curve(out / "log.jsonl").entries()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> list[float]:
    out = tmp_path_factory.mktemp("straight")
    assert status(train, out, PLAN) == 0
    return losses(out)


@pytest.mark.slow
def test_it_learns(tmp_path):
    run = trainer(tmp_path, Plan(**PLAN | {"epochs": 30}))
    run.run()
    seen = losses(tmp_path)
    assert len(seen) == run.steps > 100
    assert sum(seen[-STEPS:]) < 0.7 * sum(seen[:STEPS])
    entries = Curve(tmp_path / "log.jsonl").entries()
    assert [entry["step"] for entry in entries] == list(range(1, run.steps + 1))
    assert {"epoch", "done", "loss", "noise", "rate", "norm", "tokens", "seconds"} < {*entries[0]}
    rates = [entry["rate"] for entry in entries]
    assert max(rates) == pytest.approx(0.1, rel=0.02)
    assert rates[-1] < 0.01
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 91])
def test_killed_in_the_middle_of_a_checkpoint_it_goes_on_as_before(tmp_path, straight, count):
    """A checkpoint behind every step, each with four ``fsync``: the counts are within some of
    several epochs."""
    assert status(train, tmp_path, EVERY_STEP, kill=("fsync", count)) == -9
    before = len(losses(tmp_path))
    assert 0 < before < len(straight)
    assert status(train, tmp_path, EVERY_STEP) == 0
    assert losses(tmp_path) == pytest.approx(straight, abs=1e-6)
    assert len(losses(tmp_path)) == len(straight)


def test_killed_in_the_middle_of_an_epoch_it_goes_on_as_before(tmp_path, straight):
    """With checkpoints behind epochs only: what was learnt since is learnt again."""
    for kill, behind in ((STEPS + 4, 0), (STEPS + 6, STEPS)):
        assert status(train, tmp_path, PLAN, kill_step=kill) == -9
        assert Curve(tmp_path / "log.jsonl").entries()[-1]["step"] == behind + kill - 1
    assert status(train, tmp_path, PLAN) == 0
    assert losses(tmp_path) == pytest.approx(straight, abs=1e-6)


def test_the_comparison_would_notice(tmp_path, straight):
    """With what another seed draws, and without what the optimiser remembers."""
    torch.set_num_threads(1)
    (tmp_path / "seed").mkdir()
    trainer(tmp_path / "seed", Plan(**PLAN | {"seed": 4})).run()
    assert losses(tmp_path / "seed")[3] != pytest.approx(straight[3], abs=1e-4)
    (tmp_path / "memory").mkdir()
    assert status(train, tmp_path / "memory", EVERY_STEP, kill=("fsync", 50)) == -9
    run = trainer(tmp_path / "memory", Plan(**PLAN))
    run._resume()
    run._optimiser.state.clear()
    run._resume = lambda: None
    run.run()
    assert losses(tmp_path / "memory")[-1] != pytest.approx(straight[-1], abs=1e-4)


def test_texts_of_an_epoch_are_written_once(tmp_path):
    """On-policy: they depend on the weights of that moment, which a resumed run has no more."""
    plan = EVERY_STEP | {"settings": {"on_policy": True}}
    (tmp_path / "whole").mkdir()
    assert status(train, tmp_path / "whole", plan) == 0
    (tmp_path / "killed").mkdir()
    assert status(train, tmp_path / "killed", plan, kill=("fsync", 31)) == -9
    assert status(train, tmp_path / "killed", plan) == 0
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    for epoch in range(PLAN["epochs"]):
        files = [tmp_path / each / f"texts-{epoch}.jsonl" for each in ("whole", "killed")]
        assert files[0].read_text() == files[1].read_text()
    recipe = Toy(Settings(on_policy=True))
    (tmp_path / "here").mkdir()
    trainer(tmp_path / "here", Plan(**PLAN), recipe).run()
    assert recipe.written_for == [0, 1, 2]
    assert {text.writer for text in recipe.seen} == {"draft"}


def test_a_run_that_has_ended_is_not_made_again(tmp_path):
    trainer(tmp_path, Plan(**PLAN)).run()
    before = losses(tmp_path)
    recipe = Toy(Settings())
    again = trainer(tmp_path, Plan(**PLAN), recipe)
    again.run()
    assert recipe.seen == []
    assert losses(tmp_path) == before
    assert recipe.weight.detach().abs().sum() > 0


def test_time_ends_a_run(tmp_path):
    run = trainer(tmp_path, Plan(**PLAN | {"epochs": 10**6}, minutes=0.01))
    run.run()
    entries = Curve(tmp_path / "log.jsonl").entries()
    assert 0.5 < entries[-1]["seconds"] < 5
    assert entries[-1]["done"] > 0.9
    steps = run.steps
    again = trainer(tmp_path, Plan(**PLAN | {"epochs": 10**6}, minutes=0.01))
    again.run()
    assert again.steps == steps


def test_held_out_questions_are_not_learnt(tmp_path):
    question = ["who", "plays", "young", "damon", "in", "the", "vampire", "diaries"]
    asked = tuple(WORDS.index(word) for word in question)
    held = [Text(str(i), (*asked, 5, 6), len(asked), "target") for i in range(3)]
    told = io.StringIO()
    gate = committed(), lambda tokens: " ".join(WORDS[token] for token in tokens)
    recipe = Toy(Settings())
    given = [*texts(), *held]
    trainer(tmp_path, Plan(**PLAN), recipe, gate=gate, given=given, told=told).run()
    assert "3 of 43 texts hold questions that are held out" in told.getvalue()
    assert {text.id for text in recipe.seen} == {text.id for text in texts()}
    with pytest.raises(TrainingError, match="nothing is left to learn from"):
        trainer(tmp_path, Plan(**PLAN), gate=gate, given=held)


def test_held_out_questions_that_a_draft_writes_are_not_learnt(tmp_path):
    question = ["who", "plays", "young", "damon", "in", "the", "vampire", "diaries"]
    asked = tuple(WORDS.index(word) for word in question)
    gate = committed(), lambda tokens: " ".join(WORDS[token] for token in tokens)
    recipe = Toy(Settings())
    recipe.texts_for = lambda epoch, given: [*texts(), Text("x", (4, *asked), 1, "draft")]
    trainer(tmp_path, Plan(**PLAN), recipe, gate=gate).run()
    assert {text.id for text in recipe.seen} == {text.id for text in texts()}


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    with pytest.raises(TrainingError, match=r"the loss of step 1 is inf: lower --learning-rate"):
        trainer(tmp_path, Plan(**PLAN), Toy(Settings(explode=True))).run()
    assert not (tmp_path / "checkpoint").exists()


def test_a_full_disk_ends_the_run_and_what_was_learnt_is_kept(tmp_path, monkeypatch, straight):
    real, calls = folders.sync, [0]

    def full(path):
        calls[0] += 1
        if calls[0] > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    monkeypatch.setattr(folders, "sync", full)
    with pytest.raises(TrainingError, match=r"No space left on device.: make room or name"):
        trainer(tmp_path, Plan(**EVERY_STEP)).run()
    monkeypatch.undo()
    torch.set_num_threads(1)
    trainer(tmp_path, Plan(**EVERY_STEP)).run()
    assert losses(tmp_path) == pytest.approx(straight, abs=1e-6)


def test_a_log_that_was_cut_is_mended(tmp_path):
    curve = Curve(tmp_path / "log.jsonl")
    for step in (1, 2, 3):
        curve.add({"step": step, "loss": 1.0})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [entry["step"] for entry in curve.entries()] == [1, 2, 3]
    curve.restart(2)
    curve.add({"step": 3, "loss": 2.0})
    assert [(e["step"], e["loss"]) for e in curve.entries()] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_folder_is_one_runs(tmp_path):
    mine = RunFolder(tmp_path / "out")
    with mine.held():
        mine.take_settings({"recipe": "toy", "epochs": 3})
        mine.take_settings({"recipe": "toy", "epochs": 3})
        with pytest.raises(TrainingError, match="a run with epochs 3, now it is 4: name another"):
            mine.take_settings({"recipe": "toy", "epochs": 4})
        with pytest.raises(TrainingError, match="another run is using"), \
                RunFolder(tmp_path / "out").held():  # fmt: skip
            pass
    with RunFolder(tmp_path / "out").held():
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with RunFolder(tmp_path / "other").held(), \
            pytest.raises(TrainingError, match=r"holds 'thesis.tex' but no run"):  # fmt: skip
        RunFolder(tmp_path / "other").take_settings({})
