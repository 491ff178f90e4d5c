"""Every recipe from a command line to what is served; and one from nothing but the target."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.training import toy
from vllm_specplus.cli.main import app
from vllm_specplus.config import parse
from vllm_specplus.testing.models import build_model
from vllm_specplus.training.curve import Curve

ROOT = Path(__file__).parents[2]
#: How each result is named to the engine.
SERVED = {
    "dflash": {"method": "block_tree", "model": "result"},
    "distill": {"method": "draft_tree", "model": "result"},
    "eagle": {"method": "eagle_tree", "model": "result"},
    "eagle3": {"method": "eagle_tree", "model": "result"},
    "judge": {
        "method": "token_recycling", "allow_lossy": True,
        "acceptance": {"rule": "judge", "head": "result/head.safetensors"},
    },
    "layerskip": {"method": "early_exit", "exit_layers": [1]},
    "long_draft": {"method": "long_draft", "model": "result"},
    "acceptance_head": {
        "method": "draft_tree", "model": "DRAFT", "shape": "chain",
        "stop": {"rule": "acceptance_head", "head": "result/head.safetensors"},
    },
    "spec_ee": {
        "method": "spec_ee", "num_speculative_tokens": 4, "allow_lossy": True,
        "draft": {"method": "draft_tree", "model": "DRAFT", "shape": "topk", "width": 4},
        "predictors": "result/predictors.safetensors",
    },
}  # fmt: skip
#: Recipes that train no draft.
WITHOUT_DRAFTS = ("judge", "acceptance_head", "spec_ee")


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


def placed(config: dict, out: Path, draft: Path) -> dict:
    """With the result's folder and the draft's for their names."""
    text = json.dumps(config).replace('"result', f'"{out}/result').replace("DRAFT", str(draft))
    return json.loads(text)


@pytest.mark.parametrize("name", SERVED)
def test_from_texts_to_what_is_served(tmp_path, target, data, name):
    given = ["--target", target, "--out", tmp_path / "out", "--data", data, "--epochs", 2]
    if name in ("acceptance_head", "spec_ee"):
        given += ["--set", f"draft={target}"]  # it drafts for itself
    done = CliRunner().invoke(app, ["train", name, *map(str, given)])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["recipe"] == name
    assert report["steps"] == len(Curve(tmp_path / "out" / "log.jsonl").entries()) > 0
    assert report["measured"]["positions"] > 0
    if name not in WITHOUT_DRAFTS:
        assert 0 <= report["measured"]["greedy_acceptance"] <= 1
        assert report["measured"]["by_depth"][0]["depth"] == 1
    parse(placed(SERVED[name], tmp_path / "out", target))
    assert list((tmp_path / "out" / "result").glob("*.safetensors"))
