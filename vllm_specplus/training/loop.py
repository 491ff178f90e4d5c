"""The training loop of the embedded models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import nn


def lr_schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up, then half a cosine."""
    warm = max(steps // 20, 1)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, (1 + math.cos(math.pi * i / steps)) / 2 + 0.01),
    )


def train(
    name: str, model: nn.Module, loss_of: Callable[[], torch.Tensor], steps: int, rate: float,
    weight_decay: float, held_out: Callable[[], dict[str, float]] | None = None,
    reports: int = 12,
) -> list[dict]:  # fmt: skip
    """AdamW on what ``loss_of`` says of a random batch; afterwards ``model`` is ready to use.

    Returns (and prints) about ``reports`` entries: the mean loss since the last one, and what
    ``held_out`` measures with the model as it will be used.
    """
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=weight_decay
    )
    rates = lr_schedule(optimizer, steps)
    log, start, losses = [], time.perf_counter(), []
    for step in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        losses.append(loss.item())
        if step % max(steps // reports, 1) == 0 or step == steps - 1:
            entry = {"step": step, "loss": sum(losses) / len(losses)}
            if held_out is not None:
                model.eval()
                with torch.no_grad():
                    entry |= held_out()
                model.train()
            log.append(entry | {"seconds": round(time.perf_counter() - start, 1)})
            print(name, log[-1], flush=True)
            losses.clear()
    model.eval()
    return log
