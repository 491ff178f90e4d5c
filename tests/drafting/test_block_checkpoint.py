"""Folders of block heads: what is read, and what is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.block_heads import HIDDEN, save_block, save_medusa
from tests.drafting.test_eagle import VOCAB, edit
from tests.model_configs import target
from vllm_specplus.config import parse
from vllm_specplus.drafting.block_checkpoint import canonical, read_config


def test_layers_are_counted_as_vllm_does(tmp_path):
    """target_layer_ids name outputs, aux_hidden_state_layer_ids inputs."""
    authors = save_block(tmp_path / "a", "dflash", VOCAB, writer="authors", target_layer_ids=[1, 4])
    theirs = save_block(tmp_path / "b", "dflash", VOCAB, aux_hidden_state_layer_ids=[2, 5])
    assert read_config(authors).layer_ids == read_config(theirs).layer_ids == (2, 5)
    assert read_config(save_medusa(tmp_path / "m", VOCAB)).layer_ids is None


@pytest.mark.parametrize(
    ("keys", "depth", "queries"),
    [
        ({"kind": "dflash", "block": 8}, 7, 8),
        ({"kind": "dflash", "block": 8, "writer": "authors"}, 7, 8),
        ({"kind": "dflash", "block": 8, "sample_from_anchor": True}, 8, 8),
        ({"kind": "dspark", "block": 7}, 7, 7),
        ({"kind": "dspark", "block": 7, "writer": "authors"}, 7, 7),
        ({"kind": "dspark", "block": 7, "sample_from_anchor": False}, 6, 7),
    ],
)
def test_blocks_are_as_long_as_they_were_trained(tmp_path, keys, depth, queries):
    """Whatever number of nodes a user asks for."""
    head = read_config(save_block(tmp_path, vocab=VOCAB, **keys))
    assert (head.depth, head.body.queries) == (depth, queries)


MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 20}
THEIRS, AUTHORS = {"use_sliding_window": True}, {"writer": "authors"}


@pytest.mark.parametrize(
    ("keys", "windows", "causal"),
    [
        ({}, (None, None), (False, False)),
        (AUTHORS, (None, None), (False, False)),
        # Of speculators: layers with a window only, whatever vLLM makes of the key.
        (MIXED | THEIRS, (20, None), (True, False)),
        (MIXED | THEIRS | {"sliding_window_non_causal": True}, (20, None), (False, False)),
        (MIXED | THEIRS | {"sliding_window_non_causal": False}, (20, None), (True, False)),
        (MIXED, (None, None), (False, False)),  # as transformers reads it
        # The authors': a word for all layers, or by kinds.
        (MIXED | AUTHORS, (20, None), (True, False)),
        (MIXED | AUTHORS | {"is_causal": False}, (20, None), (False, False)),
        ({"is_causal": True} | AUTHORS, (None, None), (True, True)),
        ({"use_swa": True, "swa_window_size": 9} | AUTHORS, (9, 9), (False, False)),
    ],
)
def test_windows_and_causality(tmp_path, keys, windows, causal):
    body = read_config(save_block(tmp_path, "dflash", VOCAB, **keys)).body
    assert (body.windows, body.causal) == (windows, causal)
    assert body.window_of_anchor == ("writer" not in keys)


def test_names_of_tensors():
    assert canonical("model.layers.0.mlp.up_proj.weight") == "layers.0.mlp.up_proj.weight"
    assert canonical("0.1.linear.bias") == "blocks.0.layers.1.bias"
    assert canonical("medusa_heads.2.1.weight") == "lm_heads.2.weight"
    assert canonical("blocks.0.layers.0.weight") == "blocks.0.layers.0.weight"


def unlink(name: str):
    return lambda folder: (Path(folder) / name).unlink()


def write(name: str, text: str):
    return lambda folder: (Path(folder) / name).write_text(text)


def drop(name: str):
    return lambda folder: edit(folder, name)


def cut(folder: str) -> None:
    """The second half of the weights is missing."""
    file = Path(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


WRONG = {
    "no config": ({}, unlink("config.json"), "it has no config.json"),
    "no json": ({}, write("config.json", "{"), "is no JSON"),
    "no weights": ({}, unlink("model.safetensors"), "holds no .safetensors file"),
    "garbage": ({}, write("model.safetensors", "x"), "is no safetensors file"),
    "truncated": ({}, cut, "is no safetensors file or cut short"),
    "no fc": ({}, drop("fc.weight"), "is incomplete: it lacks fc.weight"),
    "no norm": ({}, drop("norm.weight"), "is incomplete: it lacks norm.weight"),
    "no k_norm": ({}, drop("layers.0.self_attn.k_norm.weight"), "lacks layers.0.self_attn.k_norm"),
    "a layer too few": ({"num_hidden_layers": 3}, None, "it lacks layers.2.input_layernorm.weight, "
                        "layers.2.mlp.down_proj.weight, layers.2.mlp.gate_proj.weight and 8 more"),
    "a layer too many": ({"num_hidden_layers": 1}, None, "are unknown here: layers.1."),
    "another shape": ({}, lambda f: edit(f, **{"hidden_norm.weight": torch.ones(9)}),
                      r"a tensor hidden_norm.weight of shape \(9,\), and \(64,\) fits"),
    "an own vocabulary": ({"draft_vocab_size": 9}, None, "predicts 9 of 50 tokens and says not"),
    "d2t alone": ({"own_tokens": 9}, drop("lm_head.weight"), "has no lm_head.weight for them"),
    "quantized inside": ({"transformer_layer_config": {"quantization_config": {"bits": 4}}}, None,
                         "is quantized"),
    "heads": ({}, lambda f: edit(f, **{f"layers.{i}.self_attn.k_norm.weight": torch.ones(48)
                                       for i in range(2)}), "which are no heads of 48"),
    "no size": ({}, lambda f: edit(f, **{"layers.0.self_attn.k_norm.weight": torch.ones(0)}),
                "unreadable"),
    "infinite": ({"target_hidden_size": float("inf")}, None, "unreadable"),
    "quantized": ({"quantization_config": {"bits": 4}}, None, "is quantized"),
    "layers": ({"aux_hidden_state_layer_ids": [1, 2, 3]}, None, "are not the states of 3 layers"),
    "order": ({"aux_hidden_state_layer_ids": [2, 1]}, None, "must be whole numbers in ascending"),
    "no layers": ({"aux_hidden_state_layer_ids": None}, None, "unreadable"),
    "no mask": ({"mask_token_id": None}, None, "says nowhere which token is its mask"),
    "block": ({"block_size": 1}, None, "has blocks of 1: at most 256, and such that"),
    "no block": ({"block_size": None}, None, "has no 'block_size'"),
    "window": ({"layer_types": ["sliding_attention"] * 2, "writer": "authors"}, None,
               "has layers with windows and says not which"),
    "kinds": ({"layer_types": ["full_attention"]}, None, "has 2 layers, and 'layer_types' of 1"),
    "sinks": ({"attention_sink_bias": True}, None, "has 'attention_sink_bias', which is not"),
    "rotation": ({"is_neox_style": False}, None, "rotates neighbouring units"),
    "pickled mask": ({}, write("mask_embedding.pt", ""), "pickled files are not read"),
    "other units": ({"target": 32}, None, "cannot use the embedding of its target, of 32"),
    "dflash2": ({"speculators_model_type": "dflash2"}, None, "has no 'conv_kernel_size'"),
    "xpress": ({"speculators_model_type": "xpress"}, None,
               r"of kind 'xpress' \(supported: dflash, dflash2, dspark, medusa, peagle\)"),
    "peagle": ({"speculators_model_type": "peagle"}, None, "is incomplete: it lacks mask_hidden"),
    "mtp": ({"speculators_model_type": "mtp"}, None, "of kind 'mtp'"),
    "eagle": ({"speculators_model_type": "eagle3"}, None, "use the method 'eagle_tree'"),
    "any model": ({"writer": "authors", "architectures": ["LlamaForCausalLM"]}, None,
                  "of no kind that its config.json names"),
    "gated": ({"kind": "dspark", "markov_head_type": "gated"}, None, "Markov head of type 'gated'"),
    "convolutions": ({"kind": "dflash2", "conv_kernel_size": 9}, None,
                     "has convolutions of 9 rows and 8 units, which do not fit into blocks of 4"),
    "groups": ({"kind": "dflash2", "conv_group_size": 7}, None, "of 2 rows and 7 units, which do"),
    "no convolution": ({"kind": "dflash2"}, drop("layers.1.mlp_conv.base_kernel"),
                       "it lacks layers.1.mlp_conv.base_kernel"),
    "selector": ({"kind": "dflash2", "selector_rank": 9}, None,
                 "predecessor_codebook of shape"),
    "few tokens": ({"kind": "dflash2", "own_tokens": 9}, None, "has a vocabulary of its own, or"),
    "no markov": ({"kind": "dspark"}, drop("markov_head.markov_w2.weight"), "it lacks markov_head"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_heads_that_cannot_run_are_refused(tmp_path, name):
    keys, change, sentence = WRONG[name]
    folder = save_block(tmp_path, **{"kind": "dflash", "vocab": VOCAB} | keys)
    if change:
        change(folder)
    with pytest.raises(ValueError, match=sentence) as told:
        parse({"method": "block_tree", "model": folder})
    assert "\n" not in str(told.value)


MEDUSA_WRONG = {
    "no layers": ({}, drop("blocks.0.layers.0.weight"), "lacks blocks.0.layers.0.weight"),
    "a head too few": ({"num_heads": 4}, None, "it lacks blocks.3.layers.0.weight, lm_heads.3"),
    "an output": ({}, drop("lm_heads.1.weight"), "it lacks lm_heads.1.weight"),
    "few tokens": ({"vocab_size": 60}, None, "predicts 50 of 60 tokens and says not which"),
    "pickled": ({}, unlink("model.safetensors"), "pickled files are not read"),
    "sizes": ({}, lambda f: edit(f, **{"lm_heads.1.weight": torch.ones(9, HIDDEN)}),
              "output layers of different sizes"),
}  # fmt: skip


@pytest.mark.parametrize("name", MEDUSA_WRONG)
def test_medusa_heads_that_cannot_run_are_refused(tmp_path, name):
    keys, change, sentence = MEDUSA_WRONG[name]
    folder = save_medusa(tmp_path, VOCAB, **keys)
    if change:
        change(folder)
    with pytest.raises(ValueError, match=sentence):
        parse({"method": "block_tree", "model": folder})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"family": "gpt2", "gives_layers": lambda: False},
            "vLLM hands out of some models and not of one of type 'gpt2'",
        ),
        ({"hidden_size": 65}, "of 64 hidden units, and this one has 65"),
        ({"vocab_size": 51}, "of 50 tokens, and this one has 51"),
        ({"num_layers": 1}, "reads layer 2, and the target has 1"),
        ({"keeps": 64}, "keeps 64 tokens here"),
    ],
)
def test_targets_that_a_head_was_not_made_for_are_refused(tmp_path, fields, sentence):
    config = parse({"method": "block_tree", "model": save_block(tmp_path, "dflash", VOCAB)})
    fits = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_layers": 8}
    config.check_target(target(**fits))
    with pytest.raises(ValueError, match=sentence):
        config.check_target(target(**fits | fields))


def test_a_mask_beyond_the_vocabulary_is_refused(tmp_path):
    config = parse(
        {"method": "block_tree", "model": save_block(tmp_path, "dflash", VOCAB, mask_token_id=50)}
    )
    with pytest.raises(ValueError, match="has mask token 50, and the target 50 tokens"):
        config.check_target(target(vocab_size=VOCAB, hidden_size=HIDDEN))


def test_a_shape_is_no_key_of_a_head(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'shape'"):
        parse({"method": "block_tree", "model": save_medusa(tmp_path, VOCAB), "shape": "topk"})
