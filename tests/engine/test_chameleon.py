"""Texts with pictures in them in the real engine, against two plain passes of transformers."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import chameleon
from tests.chameleon import BEGIN, CODES, END, LINE, OPENING, SIZE, TURN, WORDS
from tests.engine import harness
from tests.engine.test_images import JACOBI, RECYCLING
from tests.engine.test_sampling import chi_square
from vllm_specplus.image.chameleon import CHAMELEON, LUMINA

pytestmark = pytest.mark.engine


def engine(model, **keys) -> dict:
    """In which everything that complicates a batch happens: prompts in chunks, prefix caching,
    and preemption."""
    return {
        "model": str(model), "skip_tokenizer_init": True, "dtype": "float32",
        "enforce_eager": True, "max_num_seqs": 96, "max_num_batched_tokens": 512,
        "long_prefill_token_threshold": 24, "block_size": 32, "num_gpu_blocks_override": 120,
        "disable_log_stats": False, "max_model_len": 256, **keys,
    }  # fmt: skip


def prompts(architecture: str) -> list[list[int]]:
    """64 pictures asked for, behind words and earlier pictures, some of them begun; 16 texts of
    words alone beside them; some with beginnings in common, which end near a picture's."""
    rng = np.random.default_rng(4)
    sized = architecture == LUMINA

    def words(count: int) -> list[int]:
        return rng.integers(30, 30 + WORDS, count).tolist()

    def picture(rows: int, columns: int) -> list[int]:
        codes = rng.integers(4, 4 + CODES, (rows, columns)).tolist()
        if not sized:
            return [BEGIN, *chain(*codes), END]
        lines = chain(*([*row, LINE] for row in codes))
        return [BEGIN, SIZE + rows // 2, SIZE + columns // 2, *lines, END]

    def begun() -> list[int]:
        return (
            [BEGIN, SIZE + int(rng.integers(1, 3)), SIZE + int(rng.integers(1, 4))]
            if sized
            else [BEGIN]
        )

    shared = [OPENING, *words(80)]
    out = []
    for i in range(16):
        plain = [OPENING, *words(int(rng.integers(1, 90)))]
        out += [
            [*plain, TURN, *begun()],
            plain,
            [*shared[: 62 + i], *begun()],
            [*shared[: 62 + i], *words(3), *picture(4, 4), *words(2), *picture(4, 4)[: 4 + i]],
            [OPENING, *words(3), *picture(4, 4), *words(i), *begun()],
        ]
    return [*out, [OPENING, BEGIN], [BEGIN], begun()]


@pytest.fixture(scope="module", params=[CHAMELEON, LUMINA])
def family(request, tmp_path_factory):
    """(folder, requests of several scales, their texts by two passes of the plain model)."""
    folder = tmp_path_factory.mktemp("family") / "model"
    model = chameleon.build(folder, request.param)
    own = 4.0 if request.param == LUMINA else 3.0
    requests, expected = [], []
    for i, prompt in enumerate(prompts(request.param)):
        scale = (None, 1.0, 2.5, 0.0, 7.5)[i % 7 % 5]
        params = {
            "temperature": 0.0, "max_tokens": 30, "ignore_eos": True, "detokenize": False,
        }  # fmt: skip
        if scale is not None:
            params["extra_args"] = {"guidance_scale": scale}
        requests.append([prompt, params])
        expected.append([chameleon.greedy(model, prompt, own if scale is None else scale, 30)])
    assert len({tuple(text[0]) for text in expected}) > 30
    return folder, requests, expected


@pytest.mark.parametrize("config", [JACOBI, RECYCLING], ids=lambda config: config["method"])
def test_guided_texts_equal_two_passes(tmp_path, family, config):
    """Twice, the second time from the prefix cache."""
    folder, requests, expected = family
    keys = {"speculative_config": config}
    result = harness.run(tmp_path, engine(folder, **keys), [{"requests": requests}] * 2)
    assert harness.ids(result, 0) == expected
    assert harness.ids(result, 1) == expected
    assert result["preemptions"] > 0
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 50


@pytest.mark.parametrize(
    "keys",
    [
        {"swin_norm": True},
        # As in Lumina-mGPT's files: one row for all heads.
        {"architecture": LUMINA, "attention_bias": True},
    ],
    ids=["swin_norm", "one_row"],
)
def test_without_guidance_it_is_the_model_of_transformers(tmp_path, keys):
    """Texts, and the probabilities of words."""
    architecture = keys.get("architecture", CHAMELEON)
    own = {name: value for name, value in keys.items() if name != "architecture"}
    model = chameleon.build(tmp_path / "model", architecture, **own)
    if architecture == LUMINA:
        one_row(tmp_path / "model", model)
    texts = prompts(architecture)[:12]
    params = {
        "temperature": 0.0, "max_tokens": 20, "ignore_eos": True, "detokenize": False,
        "logprobs": 3,
    }  # fmt: skip
    result = harness.run(
        tmp_path,
        engine(
            tmp_path / "model",
            speculative_config=RECYCLING,
            hf_overrides={"guidance_scale": None},
            num_gpu_blocks_override=None,
        ),
        [{"requests": [[text, params] for text in texts]}],
    )
    for text, answer in zip(texts, result["batches"][0], strict=True):
        assert answer["ids"][0] == chameleon.greedy(model, text, 1.0, 20)
        first = chameleon.law(model, text, 1.0).log_softmax(-1)
        for token, value in answer["logprobs"][0][0].items():
            assert value == pytest.approx(float(first[int(token)]), abs=1e-4)


def one_row(folder, model) -> None:
    """Give all heads the first one's weights, and save them once."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "q_norm" in name or "k_norm" in name:
            tensors[name] = tensor[:1].contiguous()
            model.get_parameter(name).data.copy_(tensor[:1].expand_as(tensor))
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """(folder, model, prompt that lacks two of a picture's codes, prompt of words)."""
    folder = tmp_path_factory.mktemp("sampled") / "model"
    model = chameleon.build(folder, CHAMELEON, spread=0.12)
    return folder, model, [OPENING, 31, TURN, BEGIN, *range(4, 18)], [OPENING, 31, 45]


@torch.inference_mode()
def joint(model, prompt: list[int], count: int, top_k: int) -> dict[tuple, float]:
    """Probability of each continuation."""
    if not count:
        return {(): 1.0}
    top = chameleon.law(model, prompt, 3.0).topk(top_k)
    weights = top.values.softmax(-1).tolist()
    return {
        (token, *rest): weight * other
        for token, weight in zip(top.indices.tolist(), weights, strict=True)
        if weight
        for rest, other in joint(model, [*prompt, token], count - 1, top_k).items()
    }


def sample(tmp_path, folder, prompt: list[int], top_k: int, **keys) -> tuple[list, dict]:
    """3000 continuations by four tokens, and what was counted."""
    params = {
        "temperature": 1.0, "max_tokens": 4, "ignore_eos": True, "detokenize": False,
        "top_k": top_k,
    }  # fmt: skip
    config = JACOBI | {"num_speculative_tokens": 3} | keys
    arguments = engine(
        folder, speculative_config=config, max_num_seqs=256, num_gpu_blocks_override=None
    )
    batch = {"prompt": prompt, "repeat": 3000, "params": params}
    result = harness.run(tmp_path, arguments, [batch])
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 100
    return [tuple(out[0]) for out in harness.ids(result)], result["counters"]


def test_sampled_texts_have_the_models_distribution(tmp_path, sampled):
    """From the end of a picture into the words behind it."""
    folder, model, picture, _ = sampled
    made, _ = sample(tmp_path, folder, picture, 4)
    assert {text[2] for text in made} == {END}
    assert chi_square(joint(model, picture, 4, 4), made) > 1e-3


def test_codes_may_be_relaxed_and_words_not(tmp_path, sampled):
    folder, model, picture, words = sampled
    rule = {"rule": "gsd", "group": 5, "max_gap": 1.0}
    made, counters = sample(tmp_path, folder, picture, 4, acceptance=rule)
    assert counters["relaxed_tokens"] > 0
    assert chi_square(joint(model, picture, 4, 4), made) < 1e-6
    said, counters = sample(tmp_path, folder, words, 0, acceptance=rule)
    # Some of the texts begin pictures.
    assert counters["relaxed_tokens"] <= sum(BEGIN in text[:2] for text in said) < 100


def test_sampled_texts_keep_to_the_grammar(tmp_path, family):
    """In half precision, as such models are served."""
    folder, requests, _ = family
    lumina = LUMINA in (folder / "config.json").read_text()
    params = {
        "temperature": 2.0, "max_tokens": 60, "ignore_eos": True, "detokenize": False, "seed": 3,
    }  # fmt: skip
    batch = {"requests": [[prompt, params] for prompt, _ in requests]}
    keys = {"speculative_config": JACOBI, "dtype": "bfloat16"}
    result = harness.run(tmp_path, engine(folder, **keys), [batch])
    ended = 0
    for (prompt, _), answer in zip(requests, result["batches"][0], strict=True):
        text = list(prompt)
        for token in answer["ids"][0]:
            kind, tokens, _ = chameleon.allowed(text, lumina)
            assert token in tokens, (kind, text)
            ended += kind == "end"
            text.append(token)
    assert ended > 10
