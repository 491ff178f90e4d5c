"""What recipes have trained, served: texts are those of plain decoding, and drafts are accepted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.engine import harness
from tests.engine.conftest import VOCAB
from vllm_specplus.training.run import Options, run

pytestmark = pytest.mark.engine

CHAIN = {"shape": "chain", "num_speculative_tokens": 4, "control": {"policy": "fixed"}}
EARLY = {"method": "early_exit", "exit_layers": [2]}


@pytest.fixture(scope="module")
def asked() -> list:
    rng = np.random.default_rng(5)
    params = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, "detokenize": False}
    return [[rng.integers(3, VOCAB, 12).tolist(), params] for _ in range(24)]


def serve(tmp_path: Path, engine: dict, asked: list, model: str, config: dict | None) -> dict:
    arguments = engine | {"model": model}
    if config is not None:
        arguments["speculative_config"] = config
    return harness.run(tmp_path, arguments, [{"requests": asked}])


def share(result: dict) -> float:
    """Of the drafted nodes, those that were accepted."""
    return result["counters"]["nodes_accepted"] / result["counters"]["nodes_drafted"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory, tiny_engine, tiny_model, asked) -> dict:
    return serve(tmp_path_factory.mktemp("answers"), tiny_engine, asked, tiny_model, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory, answers) -> Path:
    """What the target has answered, to be learnt by heart (but for one, which is measured on)."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [
        {"tokens": each["prompt"] + each["ids"][0], "start": len(each["prompt"])}
        for each in answers["batches"][0]
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def train(tmp_path: Path, recipe: str, target: str, data: Path, **values) -> str:
    options = Options(
        recipe, Path(target), tmp_path / "out", data, epochs=values.pop("epochs"),
        batch_tokens=512, learning_rate=values.pop("rate"), dtype="float32", values=values,
    )  # fmt: skip
    run(options, Console(quiet=True))
    return str(tmp_path / "out" / "result")


def test_a_distilled_draft(tmp_path, tiny_engine, tiny_model, asked, answers, data):
    trained = train(tmp_path, "distill", tiny_model, data, layers=[0, 2], epochs=25, rate=3e-3)
    served = serve(
        tmp_path, tiny_engine, asked, tiny_model, {"method": "draft_tree", "model": trained} | CHAIN
    )
    assert harness.ids(served) == harness.ids(answers)
    assert served["counters"]["draft_failures"] == 0
    assert share(served) > 0.3


def test_a_target_that_is_left_early(tmp_path, tiny_engine, tiny_model, asked, answers, data):
    """It answers what it would have answered undrafted; before, fewer drafts were accepted."""
    settings = {"exits": [2], "dropout": 0.0, "early_scale": 1.0}
    trained = train(tmp_path, "layerskip", tiny_model, data, epochs=60, rate=2e-3, **settings)
    plain = serve(tmp_path, tiny_engine, asked, trained, None)
    served = serve(tmp_path, tiny_engine, asked, trained, EARLY | CHAIN)
    assert harness.ids(served) == harness.ids(plain)
    assert served["counters"]["draft_failures"] == 0
    before = serve(tmp_path, tiny_engine, asked, tiny_model, EARLY | CHAIN)
    assert harness.ids(before) == harness.ids(answers)
    assert share(served) > share(before) + 0.2
