"""Texts that a draft writes while it learns (on-policy), alone or mixed with its target's.

Models are those of transformers; small ones, for which an engine would start longer than it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from vllm_specplus.training.texts import Text

#: Prompts that are written on side by side.
SIDE_BY_SIDE = 32


@torch.inference_mode()
def write_on(
    draft: Any, target: Any, texts: Sequence[Text], share: float,
    by: Literal["sequence", "token"], temperature: float, length: int, rng: torch.Generator,
) -> list[Text]:  # fmt: skip
    """New texts behind the prompts of ``texts``, up to ``length`` tokens behind each.

    ``share`` of them are the draft's: of whole texts (by "sequence"), or of the tokens of each
    text, drawn one by one (by "token", where both models read everything). A text ends behind an
    end-of-sequence token of the target. ``draft`` and ``target`` are causal models of transformers,
    ``rng`` is on the CPU. An empty prompt cannot be written on, and is left out.
    """
    ends = end_tokens(target)
    asked = [text for text in texts if text.start > 0]
    by_draft = torch.rand(len(asked), generator=rng) < share
    jobs: list[tuple[list[Text], list[Any], float]] = []
    if by == "token":
        jobs.append((asked, [draft, target], share))
    else:
        for writer, chosen in ((draft, by_draft), (target, ~by_draft)):
            of_writer = [t for t, mine in zip(asked, chosen.tolist(), strict=True) if mine]
            jobs.append((of_writer, [writer], 1.0))
    written = []
    for group, models, part in jobs:
        who = "draft" if draft in models else "target"
        # Prompts of similar length are padded little.
        group = sorted(group, key=lambda text: text.start)
        for at in range(0, len(group), SIDE_BY_SIDE):
            some = group[at : at + SIDE_BY_SIDE]
            prompts = [text.tokens[: text.start] for text in some]
            for text, own in zip(
                some, draw(models, part, prompts, temperature, length, ends, rng), strict=True
            ):
                tokens = (*text.tokens[: text.start], *own)
                written.append(Text(text.id, tokens, text.start, who))
    return written


def draw(
    models: Sequence[Any], share: float, prompts: Sequence[Sequence[int]], temperature: float,
    length: int, ends: set[int], rng: torch.Generator,
) -> list[list[int]]:  # fmt: skip
    """What is written behind each prompt: every token by the first model with probability
    ``share``, else by the last."""
    tokens, mask = padded_left(prompts)
    device = models[0].device
    caches: list[Any] = [None] * len(models)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    written: list[list[int]] = [[] for _ in prompts]
    open_rows = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(length):
        drawn = []
        for i, model in enumerate(models):
            out = model(
                input_ids=tokens.to(device), attention_mask=mask.long().to(device),
                position_ids=positions.to(device), past_key_values=caches[i], use_cache=True,
            )  # fmt: skip
            caches[i] = out.past_key_values
            drawn.append(choose(out.logits[:, -1].float().cpu(), temperature, rng))
        first = torch.rand(len(prompts), generator=rng) < share
        token = torch.where(first, drawn[0], drawn[-1])
        for row in open_rows.nonzero().flatten().tolist():
            written[row].append(int(token[row]))
            open_rows[row] = int(token[row]) not in ends
        if not open_rows.any():
            break
        tokens, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat((mask, torch.ones(len(prompts), 1, dtype=torch.bool)), 1)
    return written


def choose(logits: Tensor, temperature: float, rng: torch.Generator) -> Tensor:
    """A token [B] of each row of ``logits`` [B, V]; greedy at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1)
    weights = (logits / temperature).softmax(-1)
    return torch.multinomial(weights, 1, generator=rng)[:, 0]


def padded_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and mask [B, n] of prompts that end together."""
    width = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = True
    return tokens, mask


def end_tokens(model: Any) -> set[int]:
    """Tokens with which a text of a model ends."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = model.config.eos_token_id if ids is None else ids
    return set() if ids is None else set(ids if isinstance(ids, list) else [ids])
