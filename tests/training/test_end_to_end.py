"""Every recipe from a command line to what is served; and one from nothing but the target."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.engine import harness
from tests.training import toy
from vllm_specplus.cli.main import app
from vllm_specplus.config import parse
from vllm_specplus.testing.models import build_model
from vllm_specplus.training.curve import Curve
from vllm_specplus.training.data import Prompt
from vllm_specplus.training.folder import RunFolder
from vllm_specplus.training.sources import do
from vllm_specplus.training.texts import load_texts
from vllm_specplus.training.writer import Job, write_prompts

ROOT = Path(__file__).parents[2]
#: How each result is named to the engine.
SERVED = {
    "distill": {"method": "draft_tree", "model": "result"},
    "eagle": {"method": "eagle_tree", "model": "result"},
    "eagle3": {"method": "eagle_tree", "model": "result"},
    "judge": {
        "method": "token_recycling", "allow_lossy": True,
        "acceptance": {"rule": "judge", "head": "result/head.safetensors"},
    },
    "layerskip": {"method": "early_exit", "exit_layers": [1]},
}  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("target")
    build_model(path, toy.VOCAB, 0.2)
    toy.save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Answers of which some are wrong."""
    rng = random.Random(0)
    rows = []
    for i in range(30):
        words = rng.choices(toy.WORDS[4:30], k=12)
        error = [4, 9] if i % 2 else None
        rows.append({"prompt": f"what is {' '.join(words[:3])}", "answer": " ".join(words[3:]),
                     "error": error})  # fmt: skip
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def placed(config: dict, out: Path) -> dict:
    """With the result's folder for its name."""
    text = json.dumps(config).replace('"result', f'"{out}/result')
    return json.loads(text)


@pytest.mark.parametrize("name", SERVED)
def test_from_texts_to_what_is_served(tmp_path, target, data, name):
    given = ["--target", target, "--out", tmp_path / "out", "--data", data, "--epochs", 2]
    done = CliRunner().invoke(app, ["train", name, *map(str, given)])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["recipe"] == name
    assert report["steps"] == len(Curve(tmp_path / "out" / "log.jsonl").entries()) > 0
    assert report["measured"]["positions"] > 0
    if name != "judge":
        assert 0 <= report["measured"]["greedy_acceptance"] <= 1
        assert report["measured"]["by_depth"][0]["depth"] == 1
    parse(placed(SERVED[name], tmp_path / "out"))
    assert list((tmp_path / "out" / "result").glob("*.safetensors"))


def started(target: Path, out: Path, *more: object) -> subprocess.Popen:
    """A run from nothing, as a process."""
    command = [
        sys.executable, "-m", "vllm_specplus.cli.main", "train", "eagle3", "--target", target,
        "--out", out, "--tokens", 6000, "--max-length", 64, "--epochs", 30, "--dtype", "float32",
        "--learning-rate", 0.003, "--set", "layers=[0,1,2]", *more,
    ]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.engine
def test_from_nothing_but_the_target(tmp_path, target):
    """It asks itself questions, and answers them, in an engine that is killed on the way; a head
    learns from that, and is served: texts are those of plain decoding, drafts are accepted."""
    out = tmp_path / "out"
    first = started(target, out)
    while first.poll() is None and not (out / "questions.jsonl").exists():
        time.sleep(0.1)
    assert first.poll() is None, first.communicate()
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    questions = (out / "questions.jsonl").read_text()
    # The engine may live a little longer than who has started it, and keeps the folder so long.
    for _ in range(60):
        again = started(target, out)
        told, errors = again.communicate(timeout=300)
        if "another run is using" not in errors:
            break
        time.sleep(1)
    assert again.returncode == 0, errors
    assert (out / "questions.jsonl").read_text() == questions
    texts = load_texts(out / "texts.jsonl")
    assert len(texts) > 20
    assert {text.writer for text in texts} == {"target"}
    report = json.loads(told)
    assert report["measured"]["greedy_acceptance"] > 0.1

    prompts = [list(text.tokens[: text.start]) for text in texts[:8]]
    params = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, "detokenize": False}
    batch = [{"requests": [[prompt, params] for prompt in prompts]}]
    engine = {"model": str(target), "dtype": "float32", "enforce_eager": True,
              "max_model_len": 128, "skip_tokenizer_init": True}  # fmt: skip
    plain = harness.run(tmp_path, engine, batch)
    spec = {"num_speculative_tokens": 8, "control": {"policy": "fixed"}}
    spec |= placed(SERVED["eagle3"], out)
    drafted = harness.run(tmp_path, engine | {"speculative_config": spec}, batch)
    assert harness.ids(drafted) == harness.ids(plain)
    assert drafted["counters"]["draft_failures"] == 0
    assert drafted["counters"]["nodes_accepted"] > 0


@pytest.mark.engine
def test_ray_writes_what_was_asked(tmp_path, target):
    pytest.importorskip("ray")
    folder = RunFolder(tmp_path / "out")
    prompts = [Prompt(f"q{i}", (5 + i, 6, 7)) for i in range(6)]
    with folder.held():
        write_prompts(folder.questions, prompts)
        job = Job(
            model=str(target), prompts=str(folder.questions), out=str(tmp_path / "out" / "w.jsonl"),
            tokens=10**6, length=24, temperatures=(0.0,), ray=True,
        )  # fmt: skip
        texts = do(job, folder, "texts", None, Console(quiet=True))
        alone = do(
            job.model_copy(update={"ray": False}), folder, "texts", None, Console(quiet=True)
        )
    assert {text.tokens[: text.start] for text in texts} == {each.tokens for each in prompts}
    assert {text.tokens for text in texts} == {text.tokens for text in alone}
