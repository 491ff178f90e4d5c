"""Targets, texts and a training loop of a few seconds, for the tests of recipes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.drafting.test_drafting import VOCAB, save_draft
from vllm_specplus.training.batch import Batch, Batches, collate
from vllm_specplus.training.recipe import Recipe, Setup
from vllm_specplus.training.schedules import learning_rate
from vllm_specplus.training.texts import Text

CPU = torch.device("cpu")


def setup(texts: Sequence[Text] = (), dtype: torch.dtype = torch.float32, seed: int = 0) -> Setup:
    return Setup(dtype, CPU, seed, texts)


def save_target(path: Path, layers: int = 3, **keys) -> Path:
    """A random target in float32, VOCAB tokens, which knows no token that ends a text."""
    return Path(save_draft(path, layers=layers, eos_token_id=None, bos_token_id=None, **keys))


def some_texts(count: int, length: int = 24, start: int = 4, seed: int = 0) -> list[Text]:
    """Random texts, each a little longer than the one before, in turn."""
    rng = torch.Generator().manual_seed(seed)
    return [
        Text(
            f"t{seed}-{i}",
            tuple(torch.randint(VOCAB, (length + i % 3,), generator=rng).tolist()),
            start,
            "target",
        )
        for i in range(count)
    ]


def batch_of(texts: Sequence[Text]) -> Batch:
    return collate(texts)


@torch.no_grad()
def quieten(model: torch.nn.Module) -> None:
    """Let random layers add little, so that the state of a row shows the token that it reads."""
    for name, weight in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            weight.mul_(0.05)


def fit(
    recipe: Recipe, texts: Sequence[Text], steps: int, rate: float = 2e-3,
    seen: Callable[[dict[str, float]], None] = lambda figures: None,
) -> None:  # fmt: skip
    """So many steps over ``texts``, as the trainer makes them."""
    optimizer = torch.optim.AdamW(recipe.parameters(), lr=rate, betas=(0.9, 0.95))
    rng = torch.Generator().manual_seed(1)
    batches = Batches(texts, 512, 0)
    order = [batch for epoch in range(steps) for batch in batches.epoch(epoch)][:steps]
    for step, batch in enumerate(order):
        optimizer.zero_grad()
        seen(recipe.step(batch, step / steps, rng))
        torch.nn.utils.clip_grad_norm_(recipe.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * learning_rate(step / steps)
        optimizer.step()
