"""What a recipe is: all that the trainer knows of what it trains.

A recipe is one file, ``training/recipes/NAME.py``, listed in ``training/recipes/__init__.py``, with

* ``SUMMARY``: a line that says what it trains and what serves it;
* ``DEFAULTS``, a :class:`Defaults`: what a run takes where its user says nothing;
* ``class Settings(StrictModel)``: keys of ``--set``, each with a default and a docstring;
* ``def build(target: Path, settings: Settings, setup: Setup) -> Recipe``: reads the target and
  starts the draft, or raises TrainingError;
* ``def work(shape: Shape, settings: Settings) -> Work``: what a step costs, for ``--dry-run``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from vllm_specplus.training.batch import Batch
from vllm_specplus.training.texts import Text

if TYPE_CHECKING:
    from vllm_specplus.training.measure import Measured


@dataclass(frozen=True)
class Defaults:
    """Of a recipe, so that the embedded model's run ends within the hour on two cores."""

    tokens: int = 200_000
    """Of the texts that the target writes, if it has to."""
    epochs: int = 3
    batch_tokens: int = 2048
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Setup:
    """What a run gives every recipe that is built for it."""

    dtype: torch.dtype
    """Of the products (float32 or bfloat16); trained weights are float32."""
    device: torch.device
    seed: int
    texts: Sequence[Text]
    """What will be learnt from, for what has to be counted before (a draft's vocabulary)."""


class Recipe(Protocol):
    """A draft in training, with its target. All of its randomness comes from the generators that
    it is given, or from the seed and the epoch, so that a resumed run repeats it."""

    name: str

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, all on one device, always in the same order."""

    def step(self, batch: Batch, done: float, rng: torch.Generator) -> dict[str, float]:
        """Runs forward and backward: adds to the gradients those of the mean loss over
        ``batch.learn``. ``done`` in [0, 1) is the share of the run that is over; ``rng`` is on the
        device of the parameters, as the batch is. Returns means over the same positions, by name;
        "loss" is among them."""

    def state(self) -> dict[str, Tensor]:
        """What training has changed, for checkpoints."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes up what :meth:`state` returned."""

    def texts_for(self, epoch: int, texts: Sequence[Text]) -> list[Text] | None:
        """Texts to learn from in this epoch, written for it (on-policy) behind the prompts of the
        run's ``texts``; None: those. Called once an epoch, before its first step; the run keeps
        what it returns, and a resumed run does not ask again."""

    def measure(self, texts: list[Text]) -> Measured:
        """Acceptance on texts that were not learnt from, as served."""

    def export(self, folder: Path) -> None:
        """Writes what is served into an existing, empty folder; the trainer renames it when all of
        it is on disk."""


class OfModule(ABC):
    """Members of a recipe that trains a module, or those parts of it that ask for gradients."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """What is trained, with what is not."""

    def parameters(self) -> list[nn.Parameter]:
        return [each for each in self.module.parameters() if each.requires_grad]

    def state(self) -> dict[str, Tensor]:
        named = self.module.named_parameters()
        return {name: each.detach() for name, each in named if each.requires_grad}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, weight in self.state().items():
            weight.copy_(state[name])
