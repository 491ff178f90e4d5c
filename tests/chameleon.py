"""Tiny random models of the Chameleon family, and what they generate, in plain arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from vllm_specplus.image.chameleon import CHAMELEON, LUMINA

CODES, WORDS = 24, 40
OPENING, BEGIN, END, TURN, LINE, SIZE = 0, 29, 28, 75, 76, 77
VOCAB = 160


def vocabulary() -> dict[str, int]:
    """Codes are not in the order of their tokens, as in the public models."""
    names = {"<s>": OPENING, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": END,
             "<racm3:break>": BEGIN, "<reserved08706>": TURN, "<reserved08799>": LINE,
             "<reserved08800>": SIZE}  # fmt: skip
    order = np.random.default_rng(1).permutation(CODES)
    for token, code in enumerate(order.tolist(), 4):
        letters = "".join(chr(ord("A") + int(digit)) for digit in str(code))
        names[f"IMGIMG{letters}Z"] = token
    return names | {f"word{i}": 30 + i for i in range(WORDS)}


def config(architecture: str, **keys) -> ChameleonConfig:
    return ChameleonConfig(
        **{
            "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 192,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 512, "bos_token_id": OPENING, "eos_token_id": 2,
            "vocabulary_map": vocabulary(), "architectures": [architecture],
            "vq_config": {
                "num_embeddings": CODES, "embed_dim": 32, "latent_channels": 32,
                "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1,
                "resolution": 8,
            },
        }
        | keys
    )  # fmt: skip


def build(folder: Path, architecture: str, spread: float = 0.2, **keys):
    """A random model, saved as a folder that vLLM serves."""
    torch.manual_seed(5)
    model = ChameleonForConditionalGeneration(config(architecture, **keys)).eval().float()
    for name, parameter in model.named_parameters():
        if "vqmodel" in name:
            continue
        if "q_norm" in name or "k_norm" in name:  # a weight and bias of each head
            torch.nn.init.normal_(parameter, mean=float("weight" in name), std=0.3)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=spread)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    model.save_pretrained(folder)
    model.config.architectures = [architecture]
    model.config.save_pretrained(folder)
    return model


def allowed(text: list[int], lumina: bool) -> tuple[str, list[int], int]:
    """What may follow a text, token by token: (kind, tokens, where its picture begins)."""
    codes = list(range(4, 4 + CODES))
    begin = max((i for i, token in enumerate(text) if token == BEGIN), default=-1)
    if begin < 0 or END in text[begin:]:
        return "text", [token for token in range(VOCAB) if token not in codes], -1
    inside = text[begin + 1 :]
    if not lumina:
        return ("code", codes, begin) if len(inside) < 16 else ("end", [END], begin)
    if len(inside) < 2:
        return "size", list(range(SIZE + 1, SIZE + 65)), begin
    rows, columns = (2 * (token - SIZE) for token in inside[:2])
    made = len(inside) - 2
    if made == rows * (columns + 1):
        return "end", [END], begin
    return ("line", [LINE], begin) if made % (columns + 1) == columns else ("code", codes, begin)


@torch.inference_mode()
def logits(model: ChameleonForConditionalGeneration, text: list[int]) -> torch.Tensor:
    """float32 [vocabulary] of what follows."""
    states = model.model(torch.tensor([text])).last_hidden_state
    return model.lm_head(states[0, -1])


def law(model, text: list[int], scale: float) -> torch.Tensor:
    """Logits with guidance and grammar: two passes, of two texts."""
    lumina = model.config.architectures == [LUMINA]
    kind, tokens, begin = allowed(text, lumina)
    out = logits(model, text)
    if kind == "code":
        bare = text[begin:] if lumina or begin == 0 else [OPENING, *text[begin:]]
        other = logits(model, bare)
        out = other + scale * (out - other)
    masked = torch.full_like(out, float("-inf"))
    masked[tokens] = out[tokens]
    return masked


def greedy(model, prompt: list[int], scale: float, count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(law(model, text, scale).argmax()))
    return text[len(prompt) :]


ARCHITECTURES = (CHAMELEON, LUMINA)
