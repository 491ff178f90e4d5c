"""Block heads against the modules of ``speculators``, where that package is installed."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding

from tests.block_heads import HIDDEN, MASK, save_block
from tests.drafting.test_block_heads import NAMES, SLIDING, executor
from tests.drafting.test_eagle import CLOSE, VOCAB, Texts, Vocabulary
from vllm_specplus.drafting.block_checkpoint import read_config

BLOCK = 4


@pytest.fixture(scope="module")
def theirs():
    """Their layer, mask and Markov head."""
    found = importlib.util.find_spec("speculators")
    if found is None or not found.submodule_search_locations:
        pytest.skip("speculators is not installed")
    root = Path(found.submodule_search_locations[0]) / "models"
    # The files alone: the package imports what its training needs.
    layer, mask, markov = (
        runpy.run_path(str(root / file))
        for file in (
            "dflash/model_definitions.py", "dflash/attention.py", "dspark/model_definitions.py"
        )
    )  # fmt: skip
    return (
        layer["Qwen3DFlashDecoderLayer"], mask["create_anchor_block_mask_mod"],
        markov["MarkovHead"],
    )  # fmt: skip


def backbone(theirs, folder: str, embedding, tokens: list[int], states, non_causal: bool):
    """Hidden states [BLOCK, HIDDEN] behind the norm, as ``DFlashDraftModel`` computes them."""
    layer_class, mask_mod, _ = theirs
    weights = load_file(f"{folder}/model.safetensors")
    body = read_config(folder).body
    config = Qwen3Config(**body.layer, attn_implementation="eager")
    length, n = len(states), len(tokens) - 1

    def norm(name: str) -> torch.nn.Module:
        made = Qwen3RMSNorm(HIDDEN, config.rms_norm_eps)
        made.weight.data = weights[f"{name}.weight"]
        return made

    context = norm("hidden_norm")(states @ weights["fc.weight"].T)[None]
    hidden = embedding[[tokens[-1], *[MASK] * (BLOCK - 1)]][None]
    positions = torch.cat((torch.arange(length), n + torch.arange(BLOCK)))[None]
    rotary = Qwen3RotaryEmbedding(config)(context, positions)
    for i, window in enumerate(body.windows):
        layer = layer_class(config, i)
        own = f"layers.{i}."
        layer.load_state_dict(
            {k.removeprefix(own): w for k, w in weights.items() if k.startswith(own)}
        )
        sees, queries, keys = mask_mod(
            torch.zeros(length + 1, dtype=torch.long), length + 1, torch.tensor([n]), BLOCK,
            sliding_window=window, sliding_window_non_causal=non_causal,
        )  # fmt: skip
        mask = sees(
            torch.zeros(()),
            torch.zeros(()),
            torch.arange(queries)[:, None],
            torch.arange(keys)[None],
        )
        mask = torch.cat((mask[:, :length], mask[:, length + 1 :]), 1)  # without the anchor's row
        added = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))[None, None]
        hidden = layer(
            hidden_states=hidden, target_hidden=context, attention_mask=added,
            position_ids=positions, use_cache=False, position_embeddings=rotary,
        )  # fmt: skip
    return norm("norm")(hidden)[0]


@pytest.mark.parametrize("windows", ["full", "causal", "non-causal"])
@pytest.mark.parametrize("kind", ["dflash", "dspark"])
@torch.no_grad()
def test_logits_are_those_of_speculators(tmp_path, theirs, kind, windows):
    keys = {} if windows == "full" else SLIDING | {"sliding_window_non_causal": windows[0] == "n"}
    folder = save_block(tmp_path, kind, VOCAB, block=BLOCK, **keys)
    generator = torch.Generator().manual_seed(0)
    embedding, output = torch.randn(2, VOCAB, HIDDEN, generator=generator)
    run = executor(folder, Vocabulary(embedding, 0.1 * output))
    texts = Texts([30], 2, [[6, 7, 8, 9]])
    run.follow(NAMES, texts.tokens, texts.rows([(0, 29)]))
    newest = texts.tokens[:1, 29]
    laws = run.draft(texts.rows([(28, 29)]), np.arange(1), newest, texts.lengths, VOCAB)
    tokens = texts.tokens[0, :30].tolist()
    hidden = backbone(
        theirs, folder, embedding, tokens, texts.states[0, :29], windows == "non-causal"
    )
    logits = (hidden @ (0.1 * output).T)[-run.head.config.depth :]
    torch.testing.assert_close(run.head.last[0], logits, **CLOSE)
    if kind == "dspark":
        weights = load_file(f"{folder}/model.safetensors")
        markov = theirs[2](
            verifier_vocab_size=VOCAB, draft_vocab_size=VOCAB, markov_rank=8, hidden_size=HIDDEN
        )
        markov.load_state_dict(
            {k.removeprefix("markov_head."): w for k, w in weights.items() if "markov" in k}
        )
        path = [tokens[-1]]
        for depth in range(len(logits)):  # along the most probable tokens
            parent = 0 if not depth else list(laws.tokens[0, depth - 1]).index(path[-1])
            order = laws.order[0, depth, parent]
            path.append(int(laws.tokens[0, depth, order[0]]))
        bias = markov.block_bias(
            prev_token_ids=torch.tensor([path[:-1]]), hidden_states=hidden[None]
        )
        assert (logits + bias[0]).argmax(-1).tolist() == path[1:]
