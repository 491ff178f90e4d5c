"""MTP modules against their formulas, through the executor of heads; what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.drafting.test_eagle import CLOSE, PAGE, VOCAB, Texts, Vocabulary
from tests.drafting.test_graphs import record_on_cpu
from tests.model_configs import target
from tests.mtp_modules import HIDDEN, LAYERS, Reference, save_module
from vllm_specplus.config import parse
from vllm_specplus.drafting.head_executor import MOST_WAITING, HeadExecutor
from vllm_specplus.drafting.mtp import MtpHead
from vllm_specplus.drafting.mtp_checkpoint import canonical, read_config

MODULES = {
    "mimo": {"family": "mimo"},
    "glm": {"family": "glm4_moe"},
    "glm-bias-and-norms": {"family": "glm4_moe", "attention_bias": True, "use_qk_norm": True},
    "glm-experts": {"family": "glm4_moe", "experts": True},
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    generator = torch.Generator().manual_seed(0)
    embedding, output = torch.randn(2, VOCAB, HIDDEN, generator=generator)
    return Vocabulary(embedding, 0.1 * output)


def executor(folder: str, vocabulary: Vocabulary, page: int = PAGE, record=None) -> HeadExecutor:
    head = MtpHead(folder, vocabulary, torch.device("cpu"), torch.float32)
    run = HeadExecutor(head, 6, max_requests=4, pages=40, page=page, record=record)
    run.warm_up((1, 2), 4)
    return run


@pytest.mark.parametrize(
    ("name", "record", "page"),
    [
        *((name, None, PAGE) for name in MODULES),
        ("mimo", None, 16),  # packed
        ("mimo", record_on_cpu, 16),
        ("glm-bias-and-norms", record_on_cpu, PAGE),
    ],
)
def test_logits_are_those_of_the_formulas(tmp_path, vocabulary, name, record, page):
    """Prompts in pieces, steps undrafted, rounds of trees, in a batch of different lengths."""
    folder = save_module(tmp_path, vocab=VOCAB, **MODULES[name])
    reference = Reference(folder, vocabulary.embedding, vocabulary.matrix)
    run = executor(folder, vocabulary, page, record)
    texts = Texts([3, 70, 30], 1, [[5, 37, 36, 35], [*range(10, 25)], [6, 7, 8, 9, 25, 26, 27]])
    names = ["a", "b", "c"]

    def expected(r: int, path: list[int]) -> torch.Tensor:
        length = texts.lengths[r]
        text, states = texts.tokens[r, :length].tolist(), texts.states[r, : length - 1]
        return reference(text, states, path)

    for piece in (
        [(0, 2), (0, 5), (0, 29)],
        [(2, 2), (5, 60), (29, 29)],
        [(2, 2), (60, 69), (29, 29)],
    ):
        run.follow(names, texts.tokens, texts.rows(piece))
    rng = np.random.default_rng(2)
    for _ in range(2):
        logits = run.begin(names, np.arange(3), texts.lengths)
        for r in range(3):
            torch.testing.assert_close(logits[r], expected(r, []), **CLOSE)
        first = torch.from_numpy(rng.integers(0, VOCAB, (3, 2)))
        logits = run.grow(torch.arange(3), first, torch.tensor([[-1, -1]] * 3))
        for r in range(3):
            for j in range(2):
                torch.testing.assert_close(logits[r, j], expected(r, [int(first[r, j])]), **CLOSE)
        # One tree ends here.
        second = torch.from_numpy(rng.integers(0, VOCAB, (2, 2)))
        logits = run.grow(torch.tensor([0, 2]), second, torch.tensor([[1, 0], [1, 1]]))
        for a, (r, parents) in enumerate(((0, (1, 0)), (2, (1, 1)))):
            for j, parent in enumerate(parents):
                path = [int(first[r, parent]), int(second[a, j])]
                torch.testing.assert_close(logits[a, j], expected(r, path), **CLOSE)
        # One to three tokens more of each; then so many steps undrafted that some are read late.
        for grown in [np.array([1, 2, 3]), *[np.array([1, 0, 1])] * (MOST_WAITING + 3)]:
            before = texts.lengths - 1
            texts.lengths = texts.lengths + grown
            ranges = list(zip(before.tolist(), (texts.lengths - 1).tolist(), strict=True))
            run.follow(names, texts.tokens, texts.rows(ranges))


def test_no_embedding_is_read_at_position_0(tmp_path, vocabulary):
    """Its token changes nothing; a token at position 1 does."""
    run = executor(save_module(tmp_path, "mimo", VOCAB), vocabulary)
    texts = Texts([20], 1, [[3, 4, 5]])

    def logits(changed: int) -> torch.Tensor:
        tokens = texts.tokens.copy()
        tokens[0, changed] = (tokens[0, changed] + 1) % VOCAB
        run.forget("a")
        run.follow(["a"], tokens, texts.rows([(0, 19)]))
        return run.begin(["a"], np.arange(1), texts.lengths)

    plain = logits(0)  # the first token is in no row at all
    torch.testing.assert_close(logits(1), plain, atol=0, rtol=0)
    assert not torch.allclose(logits(2), plain, **CLOSE)


def test_experts_are_chosen_as_in_float32(tmp_path, vocabulary):
    """Whatever the dtype is of the rest."""
    folder = save_module(tmp_path, "glm4_moe", VOCAB, experts=True)
    head = MtpHead(folder, vocabulary, torch.device("cpu"), torch.bfloat16)
    gate = head.parts["layer"].mlp.gate
    assert gate.e_score_correction_bias.dtype == torch.float32
    weights = load_file(Path(folder) / "model-00002-of-00002.safetensors")
    saved = weights[f"model.layers.{LAYERS}.mlp.gate.e_score_correction_bias"]
    assert torch.equal(gate.e_score_correction_bias, saved)
    assert gate.weight.dtype == torch.bfloat16


def test_names_of_tensors():
    name_of = canonical(36)
    assert name_of("model.mtp_layers.0.input_proj.weight") == "eh_proj.weight"
    assert name_of("mtp_layers.0.self_attn.q_proj.bias") == "layer.self_attn.q_proj.bias"
    assert name_of("model.layers.36.shared_head.norm.weight") == "norm.weight"
    assert name_of("model.layers.36.enorm.weight") == "enorm.weight"
    assert name_of("model.layers.3.mlp.up_proj.weight") is None
    assert name_of("model.layers.361.mlp.up_proj.weight") is None
    assert name_of("lm_head.weight") is None


def test_a_module_may_stand_alone(tmp_path, vocabulary):
    """Without its target's weights, and without ``model.`` before its names."""
    folder = save_module(tmp_path, "mimo", VOCAB)
    whole = MtpHead(folder, vocabulary, torch.device("cpu"), torch.float32)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    path = tmp_path / "model-00002-of-00002.safetensors"
    weights = {k.removeprefix("model."): w.clone() for k, w in load_file(path).items()}
    path.unlink()
    save_file(weights, tmp_path / "module.safetensors")
    alone = MtpHead(folder, vocabulary, torch.device("cpu"), torch.float32)
    for name, weight in whole.parts.state_dict().items():
        assert torch.equal(weight, alone.parts.state_dict()[name])


def edit(folder: str, drop: str = "", **tensors: torch.Tensor) -> None:
    path = Path(folder) / "model-00002-of-00002.safetensors"
    kept = {name: w.clone() for name, w in load_file(path).items() if name != drop}
    save_file(kept | tensors, path)


GLM, ODD = {"family": "glm4_moe"}, f"model.layers.{LAYERS}"
WRONG = {
    "no config": ({}, lambda f: (Path(f) / "config.json").unlink(), "it has no config.json"),
    "no json": ({}, lambda f: (Path(f) / "config.json").write_text("{"), "is no JSON"),
    "no module": ({"num_hidden_layers": 9} | GLM, None,
                  "holds no MTP module .no tensors of mtp_layers.0 or layers.9."),
    "no size": ({"hidden_size": None}, None, "has no 'hidden_size'"),
    "no layers": ({"num_hidden_layers": 0}, None, "'num_hidden_layers' 0"),
    "no norm": ({}, lambda f: edit(f, "model.mtp_layers.0.final_layernorm.weight"),
                "is incomplete: it lacks norm.weight"),
    "no bias": ({}, lambda f: edit(f, "model.mtp_layers.0.self_attn.k_proj.bias"),
                "it lacks layer.self_attn.k_proj.bias"),
    "another tensor": (GLM, lambda f: edit(f, **{f"{ODD}.mlp.odd.weight": torch.ones(3)}),
                       "are unknown here: layer.mlp.odd.weight"),
    "another shape": ({"intermediate_size": 97}, None,
                      r"layer.mlp.gate_proj.weight of shape \(96, 64\), and \(97, 64\) fits"),
    "latent attention": (GLM, lambda f: edit(f, **{f"{ODD}.self_attn.kv_b_proj.weight":
                                                   torch.ones(3)}),
                         "unknown here: layer.self_attn.kv_b_proj.weight"),
    "experts": ({"experts": True, "n_routed_experts": 5} | GLM, None,
                "has 4 experts, and its config.json says 5"),
    "heads": ({"num_key_value_heads": 3}, None, "has 4 heads, which cannot share 3 of keys"),
    "quantized": ({"quantization_config": {"bits": 4}}, None, "is quantized"),
    "window": ({"use_sliding_window": True}, None, "has a sliding window"),
    "two modules": ({"num_nextn_predict_layers": 2}, None, "has 2 layers of its own"),
    "deepseek": ({"architectures": ["DeepseekV3ForCausalLM"]}, None,
                 "of a target of type 'DeepseekV3ForCausalLM', whose layers are not supported "
                 "[(]supported: MiMoForCausalLM, Glm4MoeForCausalLM[)]"),
    "qwen3.5": ({"architectures": ["Qwen3NextForCausalLM"]}, None, "'Qwen3NextForCausalLM'"),
    "no architecture": ({"architectures": None}, None, "of a target of type 'mimo'"),
    "speculators": ({"speculators_model_type": "mtp"}, None, "a speculator of type 'mtp': merge"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_modules_that_cannot_run_are_refused(tmp_path, name):
    keys, change, sentence = WRONG[name]
    folder = save_module(tmp_path, **{"family": "mimo", "vocab": VOCAB} | keys)
    if change:
        change(folder)
    with pytest.raises(ValueError, match=sentence) as told:
        parse({"method": "mtp_tree", "model": folder})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"hidden_size": 65}, "of 64 hidden units, and this one has 65"),
        ({"vocab_size": 51}, "of 50 tokens, and this one has 51"),
        ({"num_layers": 4}, "with a target of 3 layers, and this one has 4"),
        ({"keeps": 64}, "keeps 64 tokens here"),
    ],
)
def test_targets_that_a_module_was_not_trained_with_are_refused(tmp_path, fields, sentence):
    folder = save_module(tmp_path, "glm4_moe", VOCAB)
    config = parse({"method": "mtp_tree", "model": folder})
    fits = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_layers": LAYERS}
    config.check_target(target(**fits, gives_layers=lambda: False))  # it needs none of them
    with pytest.raises(ValueError, match=sentence):
        config.check_target(target(**fits | fields))


def test_what_a_config_says(tmp_path):
    mimo = read_config(save_module(tmp_path / "mimo", "mimo", VOCAB, head_dim=None))
    assert (mimo.hidden_first, mimo.norm_output, mimo.experts) == (True, True, 0)
    assert mimo.layer["head_dim"] == HIDDEN // 4
    glm = read_config(save_module(tmp_path / "glm", "glm4_moe", VOCAB, experts=True))
    assert (glm.hidden_first, glm.norm_output, glm.experts) == (False, False, 4)
