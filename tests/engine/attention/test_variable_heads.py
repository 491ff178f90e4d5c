"""A model whose layers have different numbers of KV heads: every layer's pages are its own."""

from __future__ import annotations

import json

import pytest

from tests.engine import harness
from tests.engine.conftest import VOCAB

pytestmark = pytest.mark.engine

#: Query heads per KV head, layer by layer: 4, 1 and 2 KV heads.
GROUPS = (1, 4, 2)
HEADS, HEAD_SIZE, HIDDEN, INTERMEDIATE = 4, 32, 128, 256

CONFIGURATION = """
from types import SimpleNamespace

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, groups=(), intermediate=0, **kwargs):
        super().__init__(**kwargs)
        self.groups, self.intermediate = list(groups), intermediate

    @property
    def block_configs(self):
        return [
            SimpleNamespace(
                attention=SimpleNamespace(no_op=False, n_heads_in_group=group),
                ffn=SimpleNamespace(no_op=False, intermediate_size=self.intermediate),
            )
            for group in self.groups
        ]
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory, tiny_engine) -> dict:
    """Engine arguments of a small random DeciLM in float32."""
    import torch
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("decilm")
    (path / "configuration_decilm.py").write_text(CONFIGURATION)
    config = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "groups": GROUPS, "intermediate": INTERMEDIATE, "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": len(GROUPS),
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_SIZE,
        "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))

    generator = torch.Generator().manual_seed(7)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.25

    weights = {
        "model.embed_tokens.weight": matrix(VOCAB, HIDDEN),
        "lm_head.weight": matrix(VOCAB, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for i, group in enumerate(GROUPS):
        at, kv = f"model.layers.{i}", HEADS // group * HEAD_SIZE
        weights |= {
            f"{at}.self_attn.q_proj.weight": matrix(HEADS * HEAD_SIZE, HIDDEN),
            f"{at}.self_attn.k_proj.weight": matrix(kv, HIDDEN),
            f"{at}.self_attn.v_proj.weight": matrix(kv, HIDDEN),
            f"{at}.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_SIZE),
            f"{at}.mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{at}.mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{at}.mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
            f"{at}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{at}.post_attention_layernorm.weight": torch.ones(HIDDEN),
        }
    save_file(weights, path / "model.safetensors")
    return tiny_engine | {"model": str(path), "trust_remote_code": True}


def test_greedy_text_is_the_same(tmp_path, engine, mixed_requests):
    batches = [{"requests": mixed_requests[:12]}]
    plain = harness.run(tmp_path, engine, batches)
    assert sum(len(out[0]) for out in harness.ids(plain)) > 200
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps([[r["prompt"], r["ids"][0]] for r in plain["batches"][0]]))
    spec = {
        "method": "hidden_truth", "reference": str(reference), "shape": "tree",
        "num_speculative_tokens": 12,
    }  # fmt: skip
    drafted = harness.run(tmp_path, engine | {"speculative_config": spec}, batches)
    assert harness.ids(drafted) == harness.ids(plain)
    assert drafted["counters"]["draft_failures"] == 0
    assert drafted["counters"]["nodes_accepted"] > 100
    assert drafted["counters"]["kv_slots_moved"] > 100
