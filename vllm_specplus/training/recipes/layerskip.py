"""``layerskip``: the target learns to be left early (LayerSkip, arXiv 2404.16710).

All layers are trained at once, some of them left out at random, deeper ones more often: what is
read after ``exits`` of them, through the target's own norm and output layer, is to be what the
whole target said before. The last layer is an exit too, lest the target change: it is distilled
from itself. LayerSkip pre-trains on hard labels; here a target is at hand that says more.

The result is a whole model, to be served in the target's place and drafting for itself by
``early_exit``. Texts are lossless with regard to *it*; how much of the old target's distribution is
left is measured as ``target_kept``.

No library does this for a model that exists: torchtune's recipe reads hard labels of its own data
sets, and measures no acceptance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from vllm_specplus.drafting.exits import ExitChoice
from vllm_specplus.strict import StrictModel, quoted
from vllm_specplus.training.batch import Batch, Batches
from vllm_specplus.training.cost_model import Shape, Work
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.exits import backward_exits, layer_weights
from vllm_specplus.training.frozen import Frozen
from vllm_specplus.training.language_model import LanguageModel, load_model
from vllm_specplus.training.losses import Rows, loss_of
from vllm_specplus.training.measure import BATCH_TOKENS, Measured, Tally
from vllm_specplus.training.model_folder import own_dtype, write_model
from vllm_specplus.training.probe import DEPTH, Probe
from vllm_specplus.training.recipe import Defaults, OfModule, Setup
from vllm_specplus.training.slices import slices
from vllm_specplus.training.texts import Text

SUMMARY = "the target itself, to be left after some layers; served by early_exit"
DEFAULTS = Defaults(tokens=200_000, epochs=1, batch_tokens=2048, learning_rate=1e-4)


class Settings(StrictModel):
    """Keys of ``--set`` for ``layerskip``."""

    exits: list[int] | None = Field(default=None, min_length=1)
    """After how many layers, ascending; null: a quarter, a half and three quarters of them, as
    ``early_exit`` has it."""
    loss: str | dict[str, float] = "forward_kl"
    """Of each exit's distribution from the target's; a name, or names with weights."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability that a text passes by the last layer; of earlier ones less, exponentially."""
    early_scale: float = Field(default=0.2, gt=0)
    """How much early exits count beside the last layer."""

    @field_validator("loss")
    @classmethod
    def _is_a_loss(cls, value: str | dict[str, float]) -> str | dict[str, float]:
        loss_of(value)
        return value


class LayerSkip(OfModule):
    """The target in training, and as it was."""

    name = "layerskip"

    def __init__(
        self, student: nn.Module, target: Frozen, folder: Path, settings: Settings, setup: Setup
    ):
        self.student, self.target = LanguageModel(student, setup.dtype), target
        self._folder, self._loss = folder, loss_of(settings.loss)
        self._dropout = settings.dropout
        count = len(target.layers)
        self.exits = [*exits_of(settings, count), count]
        """The last one is the whole target."""
        self._weights = layer_weights(self.exits, count, settings.early_scale)

    @property
    def module(self) -> nn.Module:
        return self.student.model

    def step(self, batch: Batch, done: float, rng: torch.Generator) -> dict[str, float]:
        at_exits = [each[batch.learn] for each in self.read_exits(batch, self._dropped(batch, rng))]
        targets = self.target.states(batch).last[batch.learn]
        labels = batch.tokens[:, 1:][batch.learn[:, :-1]]

        def rows(here: slice, states: Tensor) -> Rows:
            target = self.target.output(targets[here])
            return Rows(target, self.student.output(states), labels[here], targets[here], states)

        losses = backward_exits(at_exits, self._weights, lambda number: rows, self._loss)
        means = [float(each.sum()) / max(len(each), 1) for each in losses]
        named = {f"exit_{layers}": mean for layers, mean in zip(self.exits, means, strict=True)}
        weighted = zip(self._weights, means, strict=True)
        return {"loss": sum(weight * mean for weight, mean in weighted)} | named

    def texts_for(self, epoch: int, texts: list[Text]) -> list[Text] | None:
        return None

    def read_exits(self, batch: Batch, dropped: Tensor | None = None) -> list[Tensor]:
        """Hidden states [B, n, hidden] behind the norm, of each exit. ``dropped`` bool [layers, B]
        says which texts pass by which layers."""
        entered: dict[int, Tensor] = {}
        with watched(self.student.layers, entered, dropped):
            last = self.student.read(batch.tokens, batch.mask)
        with self.student.autocast():
            return [*(self.student.body.norm(entered[n]) for n in self.exits[:-1]), last]

    def measure(self, texts: list[Text]) -> Measured:
        """As served: the target is the trained model, and the exit the one that ``early_exit``
        would come to choose."""
        tallies = [Tally() for _ in self.exits]  # the last one is of the target that was
        for batch in Batches(texts, BATCH_TOKENS, 0).epoch(0):
            self._compare(batch.to(self.target.device), tallies)
        early = self.exits[:-1]
        choice = ExitChoice(early, self.exits[-1], DEPTH)
        right = torch.tensor([tally.right for tally in tallies[:-1]])
        choice.observe(right.numpy(), tallies[0].count)
        served = tallies[early.index(choice.best)]
        probe = Probe.of(self.student, self.target.ends, texts)
        chains = probe.chains(self.student.after(choice.best))
        others = {
            f"exit_{layers}_{what}": value
            for layers, tally in zip(early, tallies, strict=False)
            for what, value in (("tvd", tally.tvd), ("greedy", tally.greedy))
        }
        others |= {
            "exit": choice.best, "target_kept": tallies[-1].tvd,
            "target_kept_greedy": tallies[-1].greedy,
        }  # fmt: skip
        return Measured(served.count, served.tvd, served.greedy, probe.by_depth(chains), others)

    def export(self, folder: Path) -> None:
        write_model(self.student.model, folder, self._folder, own_dtype(self._folder))

    @torch.no_grad()
    def _compare(self, batch: Batch, tallies: list[Tally]) -> None:
        *early, last = (each[batch.learn] for each in self.read_exits(batch))
        before = self.target.states(batch).last[batch.learn]
        for here in slices(len(last)):
            now = self.student.output(last[here])
            for exit_, tally in zip(early, tallies, strict=False):
                tally.add(now, self.student.output(exit_[here]))
            tallies[-1].add(self.target.output(before[here]), now)

    def _dropped(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """bool [layers, B]: LayerSkip's dropout, of whole layers and whole texts."""
        count = self.exits[-1]
        shares = torch.tensor([layer_dropout(n, count, self._dropout) for n in range(count)])
        shares = shares.to(batch.tokens.device)
        drawn = torch.rand(count, len(batch.tokens), generator=rng, device=shares.device)
        return drawn < shares[:, None]


def layer_dropout(layer: int, layers: int, most: float) -> float:
    """Share of the texts that pass by a layer, counted from 0: 0 at the first, ``most`` at the
    last one (LayerSkip, equation 2)."""
    return most * (math.exp(layer * math.log(2) / max(layers - 1, 1)) - 1)


@contextmanager
def watched(
    layers: nn.ModuleList, entered: dict[int, Tensor], dropped: Tensor | None
) -> Iterator[None]:
    """While it lasts, ``layers`` leave in ``entered`` what is read after so many of them, and texts
    pass by where ``dropped`` bool [layers, B] says."""

    def hook(number: int) -> Any:
        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if dropped is not None:
                output = torch.where(dropped[number, :, None, None], inputs[0], output)
            entered[number + 1] = output
            return output

        return after

    hooks = [layer.register_forward_hook(hook(n)) for n, layer in enumerate(layers)]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def exits_of(settings: Settings, layers: int) -> list[int]:
    """The early exits of a target; TrainingError for some that it has not got."""
    if settings.exits is None:
        return sorted({max(1, layers * i // 4) for i in (1, 2, 3)} - {layers})
    if settings.exits != sorted({*settings.exits}) or not min(settings.exits) >= 1:
        raise TrainingError(
            f"'exits' is {quoted(settings.exits)}: name each once, ascending from 1"
        )
    if settings.exits[-1] >= layers:
        raise TrainingError(
            f"'exits' is {quoted(settings.exits)}, and the target has {layers} layers: name fewer "
            f"than all of them"
        )
    return settings.exits


def build(target: Path, settings: Settings, setup: Setup) -> LayerSkip:
    """Reads the target twice: as it is, and to be trained."""
    frozen = Frozen.load(target, setup.device, setup.dtype)
    if len(frozen.layers) < 2:
        raise TrainingError(
            "the target has one layer, which it cannot be left before: take a deeper one"
        )
    student = load_model(target, "target", torch.float32, setup.device).requires_grad_(False)
    student.model.embed_tokens, student.lm_head = frozen.body.embed_tokens, frozen.model.lm_head
    student.model.layers.requires_grad_(True)
    student.model.norm.requires_grad_(True)
    return LayerSkip(student, frozen, target, settings, setup)


def work(shape: Shape, settings: Settings) -> Work:
    """What it costs; see ``training/cost_model.py``."""
    trained = shape.layers * shape.layer
    return Work(
        trained=trained, multiplied=trained, vocab=shape.vocab,
        losses=1.0 + len(exits_of(settings, shape.layers)), feature_bytes=2 * shape.hidden,
    )  # fmt: skip
