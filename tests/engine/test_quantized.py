"""Quantised targets: the same text with trees but for ties, and drafts of quantised layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.contract import folders
from tests.engine import harness

pytestmark = pytest.mark.engine

GROUP = 32
#: Nats.
TIE = 0.05


def scheme(bits: int) -> dict:
    """Of the format of compressed-tensors: 8 bits for weights by channel and for activations by
    token, or 4 for weights by groups of inputs."""
    common = {"type": "int", "symmetric": True}
    if bits == 8:
        weights = {"num_bits": 8, "strategy": "channel", "dynamic": False}
        activations = common | {"num_bits": 8, "strategy": "token", "dynamic": True}
        form = "int-quantized"
    else:
        weights = {"num_bits": 4, "strategy": "group", "group_size": GROUP, "dynamic": False}
        activations, form = None, "pack-quantized"
    group = {"targets": ["Linear"], "weights": common | weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip


def quantize(folder: Path, bits: int) -> None:
    """Write the weights of the layers anew."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        if bits == 8:
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
        else:
            groups = weight.unflatten(1, (-1, GROUP))
            scale = groups.abs().amax(2) / 7
            numbers = (groups / scale[..., None]).round().flatten(1).to(torch.int32) + 8
            places = torch.arange(0, 32, 4, dtype=torch.int32)
            tensors[name + "_packed"] = (numbers.unflatten(1, (-1, 8)) << places).sum(
                2, dtype=torch.int32
            )
            tensors[name + "_shape"] = torch.tensor(weight.shape)
        tensors[name + "_scale"] = scale
    save_file(tensors, file, {"format": "pt"})
    config = folder / "config.json"
    content = json.loads(config.read_text()) | {"quantization_config": scheme(bits)}
    config.write_text(json.dumps(content))


def equal_but_for_ties(found: dict, wanted: dict) -> bool:
    """Is the text the same, at least up to where the two best tokens are within ``TIE``?

    What 16 bits or rounded activations hold depends on the rows beside, with drafts or without.
    """
    found, words, steps = found["ids"][0], wanted["ids"][0], wanted["logprobs"][0]
    for one, other, step in zip(found, words, steps, strict=True):
        if one != other:
            best, second = sorted(step.values(), reverse=True)[:2]
            return str(one) in step and best - second < TIE
    return True


@pytest.mark.parametrize(("name", "bits"), [("qwen3", 8), ("qwen3", 4), ("gemma3", 8)])
def test_text_is_the_same(tmp_path, name, bits):
    folder = folders.make(tmp_path, name, weights=True)
    quantize(folder, bits)
    rng = np.random.default_rng(5)
    params = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "detokenize": False,
              "logprobs": 2}  # fmt: skip
    requests = [[rng.integers(3, 250, n).tolist(), params] for n in (5, 50, 150)]
    engine = {
        "model": str(folder), "dtype": "bfloat16", "enforce_eager": True, "max_model_len": 512,
        "max_num_seqs": 4, "skip_tokenizer_init": True,
    }  # fmt: skip
    want = harness.run(tmp_path, engine, [{"requests": requests}])
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps([[r["prompt"], r["ids"][0]] for r in want["batches"][0]]))
    specs = [{"method": "hidden_truth", "reference": str(reference), "num_speculative_tokens": 8}]
    if name == "qwen3":  # the other's texts do not stay in the cache
        specs.append({"method": "layer_skip", "num_speculative_tokens": 6})
    for spec in specs:
        spec["control"] = {"policy": "fixed"}
        got = harness.run(tmp_path, engine | {"speculative_config": spec}, [{"requests": requests}])
        for found, wanted in zip(got["batches"][0], want["batches"][0], strict=True):
            assert equal_but_for_ties(found, wanted), spec["method"]
        assert got["counters"]["nodes_accepted"] > 20, spec["method"]
        assert got["counters"]["draft_failures"] == 0, spec["method"]
