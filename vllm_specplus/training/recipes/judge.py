"""``judge``: the head of the acceptance rule of that name (Judge Decoding, arXiv 2501.19309,
section 4).

It learns from answers of which somebody knows where they go wrong, by characters::

    {"prompt": "What is 7 times 8?", "answer": "7 times 8 is 54.", "error": [13, 15]}

or ``"error": null`` for one that is right. Tokens before the error are right, those in it are
wrong, those behind it say nothing. The classes are weighted to count alike. The head reads what the
target computes at the token's own row, behind the last norm, as vLLM returns it.

No library trains this head; scikit-learn would fit its logistic regression, but for a dependency
more, and not by the trainer that resumes, measures and exports.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_specplus.samplers.judge import BIAS, WEIGHT
from vllm_specplus.strict import StrictModel
from vllm_specplus.training.batch import Batch, Batches
from vllm_specplus.training.cost_model import Shape, Work
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.frozen import Frozen
from vllm_specplus.training.measure import BATCH_TOKENS, Measured
from vllm_specplus.training.recipe import Defaults, Setup
from vllm_specplus.training.texts import Text

SUMMARY = "a head that tells wrong tokens from right ones; served by the acceptance rule judge"
DEFAULTS = Defaults(epochs=50, batch_tokens=2048, learning_rate=0.1)


class Settings(StrictModel):
    """Keys of ``--set`` for ``judge``."""

    decay: float = Field(default=1e-3, ge=0)
    """Of the squared weights, in the loss: hidden states have more units than errors are known."""


class Judge:
    """Logistic regression on the target's hidden states."""

    name = "judge"

    def __init__(self, target: Frozen, right: float, settings: Settings):
        """``right``: the share of right tokens among those that are known."""
        self.target, self._settings = target, settings
        self._right = right
        self.weight = nn.Parameter(torch.zeros(target.hidden_size, device=target.device))
        self.bias = nn.Parameter(torch.zeros(1, device=target.device))

    def parameters(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    def state(self) -> dict[str, Tensor]:
        return {WEIGHT: self.weight.detach(), BIAS: self.bias.detach()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, weight in self.state().items():
            weight.copy_(state[name])

    def step(self, batch: Batch, done: float, rng: torch.Generator) -> dict[str, float]:
        scores, known = self._judged(batch)
        balance = torch.where(known == 1, 0.5 / self._right, 0.5 / (1 - self._right))
        errors = F.binary_cross_entropy_with_logits(scores, known.float(), balance, reduction="sum")
        error = errors / batch.learn.sum().clamp(min=1)
        (error + self._settings.decay * self.weight.square().sum()).backward()
        return {"loss": float(error.detach())}

    def texts_for(self, epoch: int, texts: list[Text]) -> list[Text] | None:
        return None

    @torch.no_grad()
    def measure(self, texts: list[Text]) -> Measured:
        """No acceptance, but the shares of the right and of the wrong tokens that a threshold of
        0.5 tells."""
        found = [
            self._judged(batch.to(self.target.device))
            for batch in Batches(texts, BATCH_TOKENS, 0).epoch(0)
        ]
        told = torch.cat([scores > 0 for scores, _ in found] or [torch.zeros(0)])
        known = torch.cat([known for _, known in found] or [torch.zeros(0)])
        shares = {
            name: float((told[known == label] == bool(label)).float().mean())
            for name, label in (("right_told", 1), ("wrong_told", 0))
            if (known == label).any()
        }
        return Measured(len(known), None, None, (), shares)

    def export(self, folder: Path) -> None:
        weights = {name: weight.cpu().clone() for name, weight in self.state().items()}
        save_file(weights, folder / "head.safetensors")

    def _judged(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores float32 [N] of the tokens of which something is known, and their labels [N]."""
        # What counts is the position before a token; the token itself is what the head reads.
        there = batch.learn[:, :-1] & (batch.labels[:, 1:] >= 0)
        states = self.target.states(batch).last[:, 1:][there].float()
        return states @ self.weight + self.bias, batch.labels[:, 1:][there]


def build(target: Path, settings: Settings, setup: Setup) -> Judge:
    """Reads the target, and counts what is known."""
    counts = [sum(text.labels.count(label) for text in setup.texts) for label in (0, 1)]
    if not all(counts):
        raise TrainingError(
            "judge learns from right and from wrong tokens, and the texts show only one kind: give "
            '--data rows {"prompt": ..., "answer": ..., "error": [first, behind] or null}, of both'
        )
    right = counts[1] / sum(counts)
    return Judge(Frozen.load(target, setup.device, setup.dtype), right, settings)


def work(shape: Shape, settings: Settings) -> Work:
    """What it costs; see ``training/cost_model.py``."""
    return Work(
        trained=shape.hidden + 1, multiplied=shape.hidden, vocab=0, losses=0.0,
        feature_bytes=2 * shape.hidden,
    )  # fmt: skip
