"""How many experts a step touches, and what that makes of a step's time.

    python benchmarks/moe_experts.py --json OUT

Two parts. First a tiny random mixture of experts (Qwen3-MoE: 32 experts, 4 per token) is asked, by
its own router: how many experts of a layer do n rows touch, if they hold one token (as in vLLM's
dummy batch), tokens drawn from the vocabulary (as our profile of a step), or the rows of draft
trees behind texts? Beside them the formula for rows that choose independently,
N (1 - (1 - k / N)^n).

Then the roofline for Qwen3-30B-A3B (48 layers of 128 experts, 8 per token) in bfloat16 on an H200
(4.8 TB/s, 989 TFLOP/s dense): the bytes of the experts touched and of all else, or the operations,
whichever takes longer. Nothing of that part is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from vllm_specplus.planning.devices import DEVICES
from vllm_specplus.planning.sizes import Shape

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
EXPERTS, CHOSEN = 32, 4
#: Qwen3-30B-A3B, of whose layers all have experts, and an H200.
QWEN3 = Shape(48, 2048, 6144, 32, 4, 128, 151936, False, experts=128, chosen=8, expert_width=768)
H200 = DEVICES["H200"]


def tiny():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=64,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=EXPERTS, num_experts_per_tok=CHOSEN, initializer_range=0.25,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


@torch.no_grad()
def experts_of(model, texts: torch.Tensor, last: int) -> list[torch.Tensor]:
    """Of each layer the chosen experts, int64 [B * last, k], of the last rows of ``texts``."""
    logits = model(texts, output_router_logits=True).router_logits
    shape = (len(texts), texts.shape[1], -1)
    return [
        each.view(shape)[:, -last:].reshape(-1, each.shape[-1]).topk(CHOSEN, -1).indices
        for each in logits
    ]


def mean_distinct(chosen: list[torch.Tensor]) -> float:
    return sum(len(each.unique()) for each in chosen) / len(chosen)


@torch.no_grad()
def drafted(model, rows: int) -> float:
    """Rows are each text's next token and its most probable continuations: trees of four rows."""
    trees = max(rows // 4, 1)
    texts = torch.randint(0, 512, (trees, 24))
    logits = model(texts).logits[:, -1]
    best = logits.topk(3, -1).indices
    chosen: list[list[torch.Tensor]] = []
    chosen.append(experts_of(model, texts, 1))
    for i in range(min(rows - 1, 3)):
        chosen.append(experts_of(model, torch.cat((texts, best[:, i : i + 1]), 1), 1))
    return mean_distinct([torch.cat(layer) for layer in zip(*chosen, strict=True)])


def roofline(rows: int) -> dict[str, float]:
    dense = QWEN3.layers * QWEN3.attention + QWEN3.embedding
    touched = QWEN3.touched(rows)
    by_experts = 2 * (dense + QWEN3.layers * touched * QWEN3.expert) / H200.bandwidth
    compute = 2 * rows * (dense + QWEN3.layers * QWEN3.chosen * QWEN3.expert) / H200.flops
    return {"rows": rows, "experts": touched, "ms": 1e3 * max(by_experts, compute)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    model, table = tiny(), []
    for rows in ROWS:
        torch.manual_seed(rows)
        one = torch.zeros(rows, 1, dtype=torch.long)
        mixed = torch.randint(0, 512, (rows, 1))
        table.append(
            {
                "rows": rows,
                "one_token": mean_distinct(experts_of(model, one, 1)),
                "mixed_tokens": mean_distinct(experts_of(model, mixed, 1)),
                "drafted": drafted(model, rows),
                "formula": EXPERTS * (1 - (1 - CHOSEN / EXPERTS) ** rows),
            }
        )
        print(table[-1])
    lines = [roofline(rows) for rows in ROWS]
    for line in lines:
        print(line)
    args.json.write_text(
        json.dumps(
            {
                "command": " ".join(["python", "benchmarks/moe_experts.py", *sys.argv[1:]]),
                "torch": torch.__version__,
                "tiny": table, "roofline_qwen3_30b_a3b_h200": lines,
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )  # fmt: skip


if __name__ == "__main__":
    main()
