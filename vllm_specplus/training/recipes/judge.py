"""``judge``: the head of the acceptance rule of that name (Judge Decoding, arXiv 2501.19309,
section 4).

It learns from answers of which somebody knows where they go wrong, by characters::

    {"prompt": "What is 7 times 8?", "answer": "7 times 8 is 54.", "error": [13, 15]}

or ``"error": null`` for one that is right. Tokens before the error are right, those in it are
wrong, those behind it say nothing. Or from tokens that were tried out, of which only the last is
known (AutoJudge, arXiv 2504.20039). Both kinds of labels are mined by
``python -m vllm_specplus.training.judge_labels``.

The head reads what the target computes at the token's own row, before the final norm as in the
paper, or behind it. States are standardised for learning, as AutoJudge has it, and the head that is
written reads them as they are. The classes are weighted to count alike: whether Judge Decoding's
authors do is not known, AutoJudge's code does not (``balance``). Of held-out answers a threshold is
calibrated (``training/calibration.py``).

No library trains this head; scikit-learn would fit its logistic regression, but for a dependency
more, and not by the trainer that resumes, measures and exports.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_specplus.samplers.judge import BEFORE_NORM, BIAS, STATES, THRESHOLD, WEIGHT
from vllm_specplus.strict import StrictModel
from vllm_specplus.training.batch import Batch, Batches, collate
from vllm_specplus.training.calibration import Calibration, calibrate
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
    states: Literal["before_norm", "after_norm"] = "before_norm"
    """Which the head reads: what leaves the target's last layer, as published, or what its output
    layer reads."""
    balance: bool = True
    """Do right and wrong tokens count alike, however many there are of each?"""
    risk: float = Field(default=0.1, gt=0, lt=1)
    """The largest share of errors that the calibrated threshold may accept."""


class Judge:
    """Logistic regression on the target's hidden states."""

    name = "judge"

    def __init__(self, target: Frozen, texts: Sequence[Text], settings: Settings):
        """``texts``: those that will be learnt from, which have right and wrong tokens."""
        self.target, self._settings = target, settings
        wrong, right = (sum(text.labels.count(label) for text in texts) for label in (0, 1))
        self._share = right / (wrong + right) if settings.balance else 0.5
        """Of right tokens among those that are known, by which losses are weighted."""
        self._mean, self._deviation = self._moments(texts)
        self.weight = nn.Parameter(torch.zeros(target.hidden_size, device=target.device))
        self.bias = nn.Parameter(torch.zeros(1, device=target.device))
        self._calibrated: Calibration | None = None

    def parameters(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    def state(self) -> dict[str, Tensor]:
        """Of standardised states."""
        return {WEIGHT: self.weight.detach(), BIAS: self.bias.detach()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, weight in self.state().items():
            weight.copy_(state[name])

    def step(self, batch: Batch, done: float, rng: torch.Generator) -> dict[str, float]:
        states, known = self._known(batch)
        scores = (states - self._mean) / self._deviation @ self.weight + self.bias
        balance = torch.where(known == 1, 0.5 / self._share, 0.5 / (1 - self._share))
        errors = F.binary_cross_entropy_with_logits(scores, known.float(), balance, reduction="sum")
        error = errors / batch.learn.sum().clamp(min=1)
        (error + self._settings.decay * self.weight.square().sum()).backward()
        return {"loss": float(error.detach())}

    def texts_for(self, epoch: int, texts: list[Text]) -> list[Text] | None:
        return None

    @torch.no_grad()
    def measure(self, texts: list[Text]) -> Measured:
        """No acceptance, but the shares of the right and of the wrong tokens that a threshold of
        0.5 tells, and the calibrated threshold with what it does."""
        weight, bias = self.head()
        right: list[Tensor] = []
        wrong: list[Tensor] = []
        first: list[Tensor] = []
        for text in texts:
            states, known = self._known(collate([text]).to(self.target.device))
            scores = (states @ weight + bias).sigmoid()
            right.append(scores[known == 1])
            wrong.append(scores[known == 0])
            # Where the first wrong token is refused, the others are not written.
            first.append(wrong[-1][:1])
        found = {"right": torch.cat(right), "wrong": torch.cat(wrong)}
        shares = {
            f"{name}_told": float(((scores > 0.5) == (name == "right")).float().mean())
            for name, scores in found.items()
            if len(scores)
        }
        self._calibrated = calibrate(torch.cat(first), found["right"], self._settings.risk)
        if self._calibrated is not None:
            shares |= self._calibrated.to_figures()
        return Measured(sum(map(len, found.values())), None, None, (), shares)

    def head(self) -> tuple[Tensor, Tensor]:
        """Weight [hidden] and bias [1] for states as the target has them."""
        weight = self.weight.detach() / self._deviation
        return weight, self.bias.detach() - weight @ self._mean

    def export(self, folder: Path) -> None:
        """The head, with the threshold that :meth:`measure` has calibrated, if it could."""
        weight, bias = (each.cpu().clone() for each in self.head())
        told = {STATES: self._settings.states}
        if self._calibrated is not None:
            told[THRESHOLD] = repr(self._calibrated.threshold)
        save_file({WEIGHT: weight, BIAS: bias}, folder / "head.safetensors", metadata=told)

    def _known(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States float32 [N, hidden] at the tokens of which something is known, and their labels
        [N]."""
        # What counts is the position before a token; the token itself is what the head reads.
        there = batch.learn[:, :-1] & (batch.labels[:, 1:] >= 0)
        if self._settings.states == BEFORE_NORM:
            read = self.target.states(batch, (len(self.target.layers),)).layers
        else:
            read = self.target.states(batch).last
        return read[:, 1:][there].float(), batch.labels[:, 1:][there]

    def _moments(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Mean and deviation [hidden] of the states that are learnt from."""
        size, device = self.target.hidden_size, self.target.device
        count = 0
        total, squares = (torch.zeros(size, dtype=torch.float64, device=device) for _ in range(2))
        for batch in Batches(texts, BATCH_TOKENS, 0).epoch(0):
            states = self._known(batch.to(device))[0].double()
            count += len(states)
            total += states.sum(0)
            squares += states.square().sum(0)
        mean = total / max(count, 1)
        deviation = (squares / max(count, 1) - mean.square()).clamp(min=0).sqrt()
        # A unit that never changes says nothing.
        deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        return mean.float(), deviation.float()


def build(target: Path, settings: Settings, setup: Setup) -> Judge:
    """Reads the target, and counts what is known."""
    counts = [sum(text.labels.count(label) for text in setup.texts) for label in (0, 1)]
    if not all(counts):
        raise TrainingError(
            "judge learns from right and from wrong tokens, and the texts show only one kind: give "
            '--data rows {"prompt": ..., "answer": ..., "error": [first, behind] or null}, of both'
        )
    return Judge(Frozen.load(target, setup.device, setup.dtype), setup.texts, settings)


def work(shape: Shape, settings: Settings) -> Work:
    """What it costs; see ``training/cost_model.py``."""
    return Work(
        trained=shape.hidden + 1, multiplied=shape.hidden, vocab=0, losses=0.0,
        feature_bytes=2 * shape.hidden * (2 if settings.states == BEFORE_NORM else 1),
    )  # fmt: skip
