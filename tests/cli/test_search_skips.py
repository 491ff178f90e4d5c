"""`vllm-specplus search-skips` before there is an engine: what it cannot do is one sentence."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from vllm_specplus.cli.main import app
from vllm_specplus.cli.search_skips import DRAFT, _write
from vllm_specplus.config import parse


def test_what_it_drafts_with_is_draft_and_verify():
    config = parse(DRAFT)
    assert (config.levels(), config.stop.rule) == ((1,) * 8, "adaptive_confidence")
    assert config.control.policy == "fixed"


@pytest.mark.parametrize(
    ("rows", "keys", "words"),
    [
        (3, [], "has 3 questions: lower --prompts 8"),
        (0, [], "has 0 questions: lower --prompts 8"),
        (8, ["--engine-arg", "model=x"], "model is set by the benchmark itself"),
        (8, ["--out", "/nowhere/skips.json"], "in a folder that does not exist"),
    ],
)
def test_mistakes(tmp_path, rows, keys, words):
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(rows)))
    command = [
        "search-skips", "--model", "m", "--dataset", str(questions), "--out",
        str(tmp_path / "skips.json"), *keys,
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "skips.json").exists()


def test_a_result_is_written_whole(tmp_path):
    file = tmp_path / "skips.json"
    for number in range(2):
        _write(file, {"skip_attention": [number], "skip_mlp": []})
        assert json.loads(file.read_text())["skip_attention"] == [number]
    assert [each.name for each in tmp_path.iterdir()] == ["skips.json"]
