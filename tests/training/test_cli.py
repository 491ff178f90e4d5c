"""`vllm-specplus train`: from a command line to a result, or to what is said instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.training import toy
from tests.training.test_trainer import losses
from vllm_specplus.cli.main import app
from vllm_specplus.training import recipes
from vllm_specplus.training.texts import load_texts, to_line

HELD_OUT = "who plays young damon in the vampire diaries"


@pytest.fixture(autouse=True)
def toy_recipe(monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "toy", "tests.training.toy")


@pytest.fixture
def target(tmp_path) -> Path:
    return toy.save_target(tmp_path / "target")


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{to_line(text)}\n" for text in toy.texts(60)))
    return path


@pytest.fixture
def command(tmp_path, target, data):
    """Runs it with these options, and others."""

    def command(*more: object, name: str = "toy", **options):
        usual = {"target": target, "out": tmp_path / "out", "data": data, "dtype": "float32"}
        pairs = [(f"--{k.replace('_', '-')}", v) for k, v in (usual | options).items()]
        given = [str(each) for pair in pairs if pair[1] is not None for each in pair]
        return CliRunner().invoke(app, ["train", name, *given, *map(str, more)])

    return command


def test_from_texts_to_a_result(tmp_path, command, data):
    done = command(epochs=3)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    out = tmp_path / "out"
    assert report["recipe"] == "toy"
    assert report["texts"] == 57  # three are measured on
    assert report["steps"] == len(losses(out))
    assert report["measured"]["tvd_acceptance"] == 0.5
    assert json.loads((out / "measured.json").read_text()) == report
    assert load_file(out / "result" / "toy.safetensors")["weight"].shape == (toy.VOCAB, toy.VOCAB)
    assert {each.name for each in out.iterdir() if each.name != ".lock"} == {
        "checkpoint", "log.jsonl", "measured.json", "plot.png", "result", "settings.json",
        "texts.jsonl",
    }  # fmt: skip
    assert load_texts(out / "texts.jsonl") == toy.texts(60)


def test_a_run_that_has_ended_is_not_made_again(tmp_path, command):
    first = command()
    again = command()
    assert again.exit_code == 0
    assert "result is there: this run has ended" in " ".join(again.stderr.split())
    assert json.loads(again.stdout) == json.loads(first.stdout)


def test_what_was_measured_is_written_before_the_result(tmp_path, command, monkeypatch):
    """A run that ends between the two, as on a full disk, leaves no result, and goes on."""

    def fail(self, folder):
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(toy.Toy, "export", fail)
        ended = command()
    assert ended.exit_code == 2
    assert "result cannot be written (No space left on device): make room" in ended.stderr
    out = tmp_path / "out"
    assert not (out / "result").exists()
    assert not (out / "result.new").exists()
    before = losses(out)
    assert command().exit_code == 0
    assert losses(out) == before
    assert (out / "result" / "toy.safetensors").exists()


def test_settings_of_a_run_do_not_change(command):
    assert command().exit_code == 0
    for options, message in (
        ({"learning_rate": 0.2}, "a run with learning_rate 0.1, now it is 0.2: name another --out"),
        ({"seed": 1}, "a run with seed 0, now it is 1"),
    ):
        done = command(**options)
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.split())
    done = command("--set", "noise=0.25")
    assert "a run with --set noise 0.5, now it is 0.25: name another" in " ".join(
        done.stderr.split()
    )


def test_held_out_questions_are_left_out_of_data(tmp_path, command):
    data = tmp_path / "mixed.jsonl"
    rows = [{"prompt": f"what is {a} {b}", "answer": "the a"} for a in "abcde" for b in "fghij"]
    ids = [toy.WORDS.index(word) for word in HELD_OUT.split()]
    rows += [
        {"prompt": HELD_OUT, "answer": "a"},
        {"question_id": 323, "turns": ["anything"]},
        {"tokens": [*ids, 5], "start": len(ids)},
    ]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    done = command(data=data)
    assert done.exit_code == 0, done.output
    said = " ".join(done.stderr.split())
    assert "2 rows of" in said
    assert "1 of " in said
    assert "held out" in said
    kept = load_texts(tmp_path / "out" / "texts.jsonl")
    assert len(kept) == 26  # the one of tokens is dropped by the trainer, as is what a draft writes


def test_what_is_measured_on_may_be_given(tmp_path, command, data):
    measure = tmp_path / "measure.jsonl"
    lines = data.read_text().splitlines()
    measure.write_text("\n".join(lines[:7]) + "\n")
    done = command(measure=measure)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["texts"] == 53  # those seven are not learnt from
    assert report["measured"]["positions"] == sum(len(text.tokens) for text in toy.texts(60)[:7])


def test_a_dry_run_writes_nothing(tmp_path, command):
    done = command("--dry-run", flops=1e12)
    assert done.exit_code == 0, done.output
    for part in ("memory", "disk", "time", "checkpoints", "1.00 TFLOP/s"):
        assert part in done.stdout
    assert not (tmp_path / "out").exists()
    asking = command("--dry-run", data=None, tokens=10**6, flops=1e12)
    assert "the target writes" in asking.stdout
    poor = command("--dry-run", flops=1e12, batch_tokens=10**12)
    assert poor.exit_code == 2
    assert "GiB of memory" in poor.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "eagle4"}, "unknown recipe 'eagle4', did you mean 'eagle"),
        ({"target": "nowhere"}, "nowhere/config.json cannot be read: No such file or directory"),
        ({"data": "nowhere.jsonl"}, "--data 'nowhere.jsonl' is not a file: name an existing one"),
        ({"measure": "nowhere.jsonl"}, "--measure 'nowhere.jsonl' is not a file"),
        ({"epochs": 0}, "--epochs is 0: it must be above 0"),
        ({"learning_rate": -1}, "--learning-rate is -1.0: it must be above 0"),
        ({"set": "noise"}, "--set 'noise' is no KEY=VALUE: write it so"),
        ({"set": "nois=1"}, "unknown key 'nois', did you mean 'noise'? (allowed: noise, on_policy"),
        ({"set": "noise=loud"}, "'noise' is 'loud': input should be a valid number"),
        ({"set": "explode=true"}, "the loss of step 1 is inf: lower --learning-rate 0.1"),
        ({"data": None}, "has no chat template, behind which it could ask itself questions"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_sentence(tmp_path, command, options, message):
    if options == {"data": None}:
        options = options | {"target": toy.save_target(tmp_path / "bare", template=None)}
    done = command(**options)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    assert message in line
    assert "Traceback" not in done.output
    assert not (tmp_path / "out" / "result").exists()


def test_a_broken_row_is_told(tmp_path, command, data):
    data.write_text('{"tokens": [5, 6], "start": 1}\n{"tokens": [5, "6"], "start": 1}\n')
    done = command()
    assert done.exit_code == 2
    assert "data.jsonl, line 2: tokens is [5, '6']: it must be a list of ids" in done.stderr
    assert not (tmp_path / "out" / "texts.jsonl").exists()


def test_a_recipe_is_told_its_settings(command, monkeypatch):
    seen = []
    real = toy.build
    monkeypatch.setattr(
        toy, "build", lambda target, settings, setup: seen.append((settings, setup)) or real(
            target, settings, setup
        )
    )  # fmt: skip
    assert command("--set", "noise=0.25", "--set", "on_policy=true", seed=5).exit_code == 0
    ((settings, setup),) = seen
    assert (settings.noise, settings.on_policy) == (0.25, True)
    assert setup.seed == 5
    assert len(setup.texts) == 57
