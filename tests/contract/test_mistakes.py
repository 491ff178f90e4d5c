"""Wrong configurations through vLLM's own path: each is answered in one sentence, or works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.block_heads import save_block
from tests.contract import folders, launches
from tests.drafting.test_drafting import save_draft
from tests.eagle_heads import save_head
from vllm_specplus.strict import MOST_TOLD

LINES = [
    json.loads(line) for line in (Path(__file__).parent / "mistakes.jsonl").read_text().splitlines()
]


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, str]:
    """What the words in braces stand for."""
    root = tmp_path_factory.mktemp("mistakes")
    noise = np.random.default_rng(3).bytes(4000)
    draft = Path(save_draft(root, layers=2, vocab=256))
    for tokenizer in folders.make(root, "llama3").glob("tokenizer*"):
        shutil.copy(tokenizer, draft)
    config = json.loads((draft / "config.json").read_text())
    weights = (draft / "model.safetensors").read_bytes()
    deep = "[" * 100_000 + "]" * 100_000

    def folder(name: str, config: str, weights: bytes = weights) -> str:
        (root / name).mkdir()
        (root / name / "config.json").write_text(config)
        (root / name / "model.safetensors").write_bytes(weights)
        return str(root / name)

    def file(name: str, content: bytes) -> str:
        (root / name).write_bytes(content)
        return str(root / name)

    others = {key: value for key, value in config.items() if key != "vocab_size"}
    (root / "a folder").mkdir()
    head = Path(save_block(root / "head", "dflash", 256))
    cut = (head / "model.safetensors").read_bytes()[:9000]
    target = str(folders.make(root, "llama3"))
    fits = save_head(root / "speculator", 3, 256, hidden=512)
    homeless = save_head(root / "homeless", 3, 256, hidden=512)
    other = save_block(root / "block speculator", "dflash", 256)
    return {
        "A_FOLDER": str(root / "a folder"),
        "BLOCK_HEAD": str(head),
        "BLOCK_SPECULATOR": speculator(other, target),
        "CUT_BLOCK_HEAD": folder("cut head", (head / "config.json").read_text(), cut),
        "CUT_MATRIX": file("cut", weights[:500]),
        "DEEP_CONFIG": folder("deep", f'{{"x": {deep}}}'),
        "DRAFT": str(draft),
        "EMPTY_FILE": file("empty", b""),
        "GARBAGE_WEIGHTS": folder("garbage", json.dumps(config), noise),
        "JUDGE": judge(root / "judge", {"states": "before_norm"}),
        "JUDGE_OF_NOTHING": judge(root / "nothing", {"states": "embeddings"}),
        "JSON_LIST": file("list", b"[1, 2]"),
        "JSON_OF_OTHER_KEYS": file("keys", b'{"a": 1}'),
        "LONG_NAME": "x" * 5000,
        "NESTED": deep[60_000:-60_000],
        "NO_VOCABULARY": folder("none", json.dumps(others)),
        "RANDOM_BYTES": file("random", noise),
        "SPECULATOR": speculator(fits, target),
        "SPECULATOR_OF_NOBODY": speculator(homeless, None),
        "TEXT_VOCABULARY": folder("text", json.dumps(config | {"vocab_size": "256"})),
    }


def judge(path: Path, told: dict[str, str]) -> str:
    """The head of an acceptance rule, for the targets' 512 units."""
    weights = {"weight": np.zeros(512, np.float32), "bias": np.zeros(1, np.float32)}
    save_file(weights, path, metadata=told)
    return str(path)


def speculator(folder: str, target: str | None) -> str:
    """Let a head's config be as `speculators` write it, with its target."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    if "speculators_model_type" not in config:
        config = {
            "speculators_model_type": "eagle3", "draft_vocab_size": config["vocab_size"],
            "transformer_layer_config": config,
        }  # fmt: skip
    config["speculators_config"] = {
        "algorithm": config["speculators_model_type"],
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
        "verifier": {"name_or_path": target, "architectures": ["LlamaForCausalLM"]},
    }
    path.write_text(json.dumps(config))
    return folder


def filled(spec: dict | str | None, names: dict[str, str]) -> dict | str | None:
    text = json.dumps(spec)
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    return json.loads(text)


@pytest.mark.slow
def test_wrong_configurations_are_told_in_one_sentence(names, tmp_path):
    wanted = [
        (row["model"], filled(row["line"], names), filled(row["spec"], names)) for row in LINES
    ]
    answers = launches.outcomes(wanted, tmp_path)
    assert len(answers) == len(LINES) > 50
    wrong = []
    for row, answer in zip(LINES, answers, strict=True):
        if row["says"] is None:
            good = answer is None
        else:
            good = answer is not None and row["says"] in answer and "\n" not in answer
            # vLLM's parser names the flag, and Python the exception's type.
            good = good and len(answer) <= MOST_TOLD + 50
        if not good:
            wrong.append((row, answer))
    assert wrong == []
