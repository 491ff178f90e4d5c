"""Train an EAGLE head for a target (arXiv 2401.15077, section 4.1), without a dataset.

    python -m vllm_specplus.training.eagle --target DIR --out DIR [--texts texts.json]

1. *Texts.* The target writes them (``training/distill.py``), or those of an earlier run.
2. *Head.* It starts as the target's last layer, behind an ``fc`` that adds the hidden state
   and the embedding.
3. *Objective.* At every position the divergence of the head's distribution from the target's,
   and the smooth L1 distance of its hidden state to the target's, which the next level of a
   tree starts from. Noise on the hidden states that are read makes up for theirs being
   right, as the paper has it.

The result is read by ``{"method": "eagle_tree"}``, and by vLLM's own ``eagle``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn.functional import smooth_l1_loss

from vllm_specplus.drafting.dense_attention import DenseAttention
from vllm_specplus.drafting.eagle import EagleHead
from vllm_specplus.training.distill import (
    Lessons,
    Rows,
    acceptance,
    follow,
    forward_kl,
    hold_out,
    load,
    write_texts,
)

NOISE, DISTANCE_WEIGHT = 0.1, 1.0


class TargetVocabulary:
    """A transformers model's embedding and output layer, as ``drafting.eagle.Vocabulary``."""

    def __init__(self, target):
        self._target = target

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._target.model.embed_tokens(tokens)

    def output(self, normed: torch.Tensor) -> torch.Tensor:
        return self._target.lm_head(normed).float()


def start_head(target, out: Path) -> EagleHead:
    """Write a head made of the target's last layer, and load it to be trained."""
    from safetensors.torch import save_file

    last = target.model.layers[-1].state_dict()
    hidden = target.config.hidden_size
    weights = {f"layers.0.{n}": w.clone() for n, w in last.items() if "input_layernorm" not in n}
    weights["fc.weight"] = torch.cat((torch.eye(hidden), torch.eye(hidden)), 1)
    save_file(weights, out / "model.safetensors")
    config = target.config.to_dict() | {
        "architectures": ["EagleLlamaForCausalLM"], "num_hidden_layers": 1, "layer_types": None,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n")
    vocabulary = TargetVocabulary(target)
    return EagleHead(
        str(out), vocabulary, target.config.vocab_size, torch.device("cpu"), torch.float32
    )


def run_head(head: EagleHead, tokens, mask, states) -> torch.Tensor:
    """y [N, d] of the rows of whole texts; ``tokens``, ``mask`` [B, n], ``states`` [B, n, d]."""
    rows = tokens.shape[1] - 1
    positions = torch.arange(rows).expand(len(tokens), -1)
    causal = torch.ones(rows, rows, dtype=torch.bool).tril() & mask[:, None, :rows]
    causal |= torch.eye(rows, dtype=torch.bool)  # padding sees itself
    with torch.autocast("cpu", torch.bfloat16):
        y = head(
            tokens[:, 1:].flatten(), states[:, :-1].flatten(0, 1), head.rotary(positions.flatten()),
            DenseAttention(causal[:, None]),
        )  # fmt: skip
    return y[mask[:, 1:].flatten()]


def scatter(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[N, d] at the positions of ``mask`` [B, n] -> [B, n, d]."""
    full = rows.new_zeros(*mask.shape, rows.shape[-1])
    full[mask] = rows
    return full


def rows_of(head: EagleHead, noise: float) -> Rows:
    """The target's hidden states, and the head's for the same positions."""

    def rows(tokens, mask, states) -> tuple[torch.Tensor, torch.Tensor]:
        states = scatter(states.float(), mask)
        noisy = states + noise * (2 * torch.rand_like(states) - 1)
        return states[:, 1:][mask[:, 1:]], run_head(head, tokens, mask, noisy).float()

    return rows


def train(head: EagleHead, target, texts: list[list[int]], minutes: float, seed: int) -> int:
    """Passes over ``texts`` until the time is up; returns the number of steps."""
    weights = list(head.parts.requires_grad_(True).parameters())

    def loss(p, log_q, target_states, draft_states, done):
        distance = smooth_l1_loss(draft_states, target_states, reduction="none").mean(-1)
        return forward_kl(p, log_q) + DISTANCE_WEIGHT * distance

    lessons = Lessons(target, texts)
    return follow(rows_of(head, NOISE), loss, weights, target, lessons, minutes, seed)


def evaluate(head: EagleHead, target, texts: list[list[int]]) -> dict[str, float]:
    """Acceptance of the first level over all positions; see ``distill.acceptance``."""
    return acceptance(rows_of(head, 0.0), target, Lessons(target, texts))


def main(
    target: Annotated[Path, typer.Option(help="Folder of the target model.")],
    out: Annotated[Path, typer.Option(help="Folder of the head.")],
    texts: Annotated[
        Path | None, typer.Option(help="texts.json of an earlier run; else they are written.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of text to write.")] = 200_000,
    minutes: Annotated[float, typer.Option(help="Time to train.")] = 12.0,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train an EAGLE head of TARGET into OUT."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    kept = texts or out / "texts.json"
    if not kept.exists():
        kept.write_text(json.dumps(write_texts(str(target), tokens, seed)))
    held_out, learnt = hold_out(json.loads(kept.read_text()))
    torch.manual_seed(seed)
    teacher = load(target).requires_grad_(False)
    head = start_head(teacher, out)
    steps = train(head, teacher, learnt, minutes, seed)
    weights = {
        name.replace("layer.", "layers.0.", 1): weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in head.parts.state_dict().items()
    }
    save_file(weights, out / "model.safetensors")
    typer.echo(json.dumps({"texts": len(learnt), "steps": steps}
                          | evaluate(head, teacher, held_out)))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
