"""Models that see pictures: the same text as plain decoding, with drafts accepted, for prompts with
pictures of several sizes and without, read in chunks, with prefixes cached and preempted."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.engine import harness
from tests.engine.test_families import ENGINE, REFUSED, draft

pytestmark = [
    pytest.mark.engine,
    pytest.mark.full(
        "vllm_specplus/engine/attention/*.py", "vllm_specplus/engine/batch.py",
        "vllm_specplus/engine/tree_metadata.py", "vllm_specplus/engine/target_layers.py",
        "vllm_specplus/kernels/**/*.*", "vllm_specplus/tree.py", "tests/contract/folders.py",
        "tests/contract/vision.py", "tests/contract/beside_cpu/*.py",
        "tests/engine/test_families.py", "vllm_specplus/testing/engine.py",
    ),
]  # fmt: skip

#: Where ``make full`` puts it: beside a CPU build of torch it breaks what imports it unprepared.
TORCHVISION = harness.ROOT / "build" / "torchvision"
BESIDE_CPU = harness.ROOT / "tests" / "contract" / "beside_cpu"
ENV = {"PYTHONPATH": os.pathsep.join(map(str, (BESIDE_CPU, TORCHVISION, harness.ROOT)))}
LLAVA = "<|image_pad|>"
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
#: name -> where the prompt has its picture, and whether the text's layers can be left out.
FAMILIES = {
    "llava": (LLAVA, True), "qwen2_vl": (QWEN, False), "qwen2_5_vl": (QWEN, False),
    "qwen3_vl": (QWEN, False),
}  # fmt: skip
#: Words before and behind the picture, and its height and width, None: there is no picture.
PROMPTS = (
    (2, 3, (32, 32)), (30, 1, (64, 48)), (40, 25, (32, 64)), (64, 1, None), (100, 60, (64, 64)),
    (5, 200, (48, 48)),
)  # fmt: skip


def requests(mark: str) -> list[list]:
    rng = np.random.default_rng(5)
    params = {"temperature": 0, "max_tokens": 60, "ignore_eos": True, "detokenize": False}
    found = []
    for before, behind, size in PROMPTS:
        words = [f"w{i}" for i in rng.integers(0, 200, before + behind)]
        if size is not None:
            words.insert(before, mark)
        prompt: dict = {"prompt": " ".join(words)}
        if size is not None:
            pixels = rng.integers(0, 256, (*size, 3))
            prompt["multi_modal_data"] = {"image": pixels.tolist()}
        found.append([prompt, params])
    return found


def run(tmp_path, engine: dict, batches: list[dict]) -> dict:
    return harness.run(tmp_path, engine, batches, env=ENV)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_the_same(tmp_path, name):
    if not TORCHVISION.is_dir():
        pytest.skip("make full installs the torchvision that processors of pictures need")
    mark, apart = FAMILIES[name]
    subprocess.run(
        [sys.executable, "-m", "tests.contract.vision", str(tmp_path), name],
        cwd=harness.ROOT, env=os.environ | ENV, check=True,
    )  # fmt: skip
    engine = ENGINE | {
        "model": str(tmp_path / name), "skip_tokenizer_init": False,
        "limit_mm_per_prompt": {"image": 1} | ({} if name == "llava" else {"video": 0}),
    }  # fmt: skip
    batches = [{"requests": requests(mark)}] * 2  # the second with its prefixes cached
    want = run(tmp_path, engine, batches)
    texts = harness.ids(want)
    assert harness.ids(want, 1) == texts
    assert np.median([len(set(text[0])) for text in texts]) > 5
    plain = [{"requests": [r for r in requests(mark) if "multi_modal_data" in r[0]]}]
    blind = json.loads(json.dumps(plain))  # other pictures, other texts
    for prompt, _ in blind[0]["requests"]:
        shape = np.shape(prompt["multi_modal_data"]["image"])
        prompt["multi_modal_data"]["image"] = np.zeros(shape, int).tolist()
    unseen = harness.ids(run(tmp_path, engine, blind))
    seen = [text for text, (_, _, size) in zip(texts, PROMPTS, strict=True) if size is not None]
    assert all(a != b for a, b in zip(seen, unseen, strict=True))
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps([[r["prompt"], r["ids"][0]] for r in want["batches"][0]]))
    specs = [
        {"method": "hidden_truth", "reference": str(reference), "num_speculative_tokens": 8},
        {"method": "token_recycling", "num_speculative_tokens": 12},
        draft(tmp_path) | {"num_speculative_tokens": 9},
        {"method": "layer_skip", "num_speculative_tokens": 6},
    ]
    for spec in specs:
        spec["control"] = {"policy": "fixed"}
        changed = engine | {"num_gpu_blocks_override": 22, "speculative_config": spec}
        if spec["method"] == "layer_skip" and not apart:
            with pytest.raises(RuntimeError, match=REFUSED):
                run(tmp_path, changed, batches)
            continue
        got = run(tmp_path, changed, batches)
        assert [harness.ids(got), harness.ids(got, 1)] == [texts, texts], spec["method"]
        counters = got["counters"]
        assert counters["nodes_drafted"] > 100, spec["method"]
        assert counters["draft_failures"] == 0, spec["method"]
        if spec["method"] != "draft_tree":  # of random weights, whose texts the draft cannot know
            assert counters["nodes_accepted"] > 0, spec["method"]
        assert got["preemptions"] > 0, spec["method"]
