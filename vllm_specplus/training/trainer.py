"""The loop that trains what any recipe describes: epochs, batches, AdamW, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vllm_specplus.training.batch import Batch, Batches
from vllm_specplus.training.checkpoint import Checkpoints, load_optimiser, optimiser_state
from vllm_specplus.training.checkpoint import Progress as Place
from vllm_specplus.training.curve import Curve
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.folder import RunFolder, write_text
from vllm_specplus.training.ranks import Ranks
from vllm_specplus.training.recipe import Recipe
from vllm_specplus.training.schedules import learning_rate
from vllm_specplus.training.splits import Gate
from vllm_specplus.training.texts import Text, load_texts, to_line

BETAS, WEIGHT_DECAY, LONGEST_STEP = (0.9, 0.95), 0.01, 1.0


@dataclass(frozen=True)
class Plan:
    """How long and how fast a run learns."""

    epochs: int
    batch_tokens: int
    """Positions of a step, of all ranks together."""
    learning_rate: float
    seed: int
    minutes: float | None = None
    """The run ends after this time, if its epochs have not ended before; the schedules then follow
    whichever is further."""
    checkpoint_seconds: float = 300.0
    """Least time between checkpoints; one is written behind every epoch as well."""


@dataclass(frozen=True)
class Moment:
    """A step that is to be made."""

    epoch: int
    index: int
    """Of the epoch's batches."""
    last: bool
    """Is it the epoch's last?"""
    done: float
    """Share of the run that is over."""
    batch: Batch


class Trainer:
    """A run of a recipe over texts, from the start or from where it was ended."""

    def __init__(
        self, recipe: Recipe, texts: Sequence[Text], plan: Plan, folder: RunFolder, gate: Gate,
        ranks: Ranks, console: Console,
    ):  # fmt: skip
        self._recipe, self._plan, self._folder = recipe, plan, folder
        self._gate, self._ranks, self._console = gate, ranks, console
        self._texts = self._gate.admit(texts)
        self._parameters = recipe.parameters()
        self._optimiser = torch.optim.AdamW(
            self._parameters, lr=plan.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        self._checkpoints = Checkpoints(folder.checkpoints)
        self._curve = Curve(folder.log)
        self._place = Place()
        self._saved = self._place
        """That of the newest checkpoint."""
        self._rng = torch.Generator(ranks.device)

    @property
    def steps(self) -> int:
        """Steps that were made, with those before a resumption."""
        return self._place.step

    def run(self) -> None:
        """Trains from the newest checkpoint, or the start, to the end, and draws the curve.

        TrainingError: nothing can be learnt from, the loss is no number, or the disk is full.
        """
        self._resume()
        started = saved = time.monotonic()
        before = self._place.seconds
        with self._bar() as bar:
            task = bar.add_task("", total=1.0, completed=0.0)
            for moment in self._moments(lambda: before + time.monotonic() - started):
                entry = self._step(moment)
                at = (moment.epoch + 1, 0) if moment.last else (moment.epoch, moment.index + 1)
                seconds = before + time.monotonic() - started
                self._place = Place(*at, self._place.step + 1, seconds)
                self._log(moment, entry)
                bar.update(
                    task, completed=moment.done,
                    description=f"step {self.steps}, loss {entry['loss']:.4f}",
                )  # fmt: skip
                if moment.last or time.monotonic() - saved >= self._plan.checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
        self._save()
        if self._ranks.first:
            self._curve.plot(self._folder.plot)

    def _moments(self, clock: Callable[[], float]) -> Iterator[Moment]:
        """The steps that are left to be made, until the epochs or the time end."""
        for epoch in range(self._place.epoch, self._plan.epochs):
            batches = Batches(self._texts_of(epoch), self._plan.batch_tokens, self._plan.seed)
            first = self._place.batch
            for index, batch in enumerate(batches.epoch(epoch, first), first):
                done = (epoch + index / len(batches)) / self._plan.epochs
                if self._plan.minutes is not None:
                    # All ranks go by the first one's clock, lest one stops alone.
                    done = max(done, self._ranks.shared(clock()) / (60 * self._plan.minutes))
                if done >= 1:
                    self._place = replace(self._place, epoch=self._plan.epochs, batch=0)
                    return
                yield Moment(epoch, index, index + 1 == len(batches), done, batch)

    def _step(self, moment: Moment) -> dict[str, float]:
        """Makes one step of the optimiser; returns what the recipe says of it."""
        batch, ranks, plan = moment.batch, self._ranks, self._plan
        own = batch if ranks.count == 1 else batch.part(ranks.rank, ranks.count)
        weight = float(own.learn.sum() / batch.learn.sum()) if own else 0.0
        self._optimiser.zero_grad()
        # Drawn from the step's number, so that a resumed run draws the same.
        seed = (plan.seed * 1_000_003 + self._place.step) * 4096 + ranks.rank
        self._rng.manual_seed(seed % 2**63)
        torch.manual_seed(seed % 2**63)
        means = self._recipe.step(own.to(ranks.device), moment.done, self._rng) if own else {}
        ranks.sum_gradients(self._parameters, weight)
        means = ranks.mean(means, weight)
        if not math.isfinite(means["loss"]):
            raise TrainingError(
                f"the loss of step {self._place.step + 1} is {means['loss']}: lower "
                f"--learning-rate {plan.learning_rate}, or train with --dtype float32"
            )
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, LONGEST_STEP)
        rate = plan.learning_rate * learning_rate(moment.done)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        return means | {"rate": rate, "norm": float(norm)}

    def _log(self, moment: Moment, entry: dict[str, float]) -> None:
        if self._ranks.first:
            self._curve.add({
                "step": self.steps, "epoch": moment.epoch, "done": round(moment.done, 6), **entry,
                "tokens": int(moment.batch.learn.sum()),
                "seconds": round(self._place.seconds, 3),
            })  # fmt: skip

    def _texts_of(self, epoch: int) -> Sequence[Text]:
        """The run's texts, or those that the recipe writes for this epoch: they depend on what it
        has learnt by then, so that those of an epoch that was begun are read again."""
        file = self._folder.epoch_texts(epoch)
        if self._ranks.first and self._place.batch == 0 and not file.exists():
            written = self._recipe.texts_for(epoch, self._texts)
            if written is not None:
                write_text(file, "".join(f"{to_line(text)}\n" for text in written))
        there = self._ranks.shared(file.exists())
        return self._gate.admit(load_texts(file)) if there else self._texts

    def _resume(self) -> None:
        """Takes up the newest checkpoint, if there is one."""
        found = self._checkpoints.load()
        if found is not None:
            self._place, state = found
            self._saved = self._place
            prefix = "recipe."
            own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            self._recipe.load_state(own)
            load_optimiser(self._optimiser, state)
            self._console.print(f"goes on behind step {self.steps}")
        self._ranks.spread([parameter.data for parameter in self._parameters])
        if self._ranks.first:
            self._curve.restart(self.steps)

    def _save(self) -> None:
        if self._ranks.first and self._saved != self._place:
            own = {f"recipe.{name}": tensor for name, tensor in self._recipe.state().items()}
            self._checkpoints.save(self._place, own | optimiser_state(self._optimiser))
            self._saved = self._place

    def _bar(self) -> Progress:
        """A bar with the time left."""
        return Progress(
            BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left:"),
            TimeRemainingColumn(), TextColumn("{task.description}", markup=False),
            console=self._console, transient=True,
        )  # fmt: skip
