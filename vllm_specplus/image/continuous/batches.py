"""Pictures of a model of latents for many who ask one by one, made in whole batches.

A batch is what waits when the one before it is done: masked models see all latents of a picture at
every iteration, and pictures of a batch go through their iterations together.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from vllm_specplus.image.continuous.folder import LatentsFolder
from vllm_specplus.image.continuous.generation import Recipe

logger = logging.getLogger("vllm.specplus")


@dataclass(frozen=True, slots=True)
class Wish:
    """One picture."""

    label: int
    seed: int
    temperature: float
    guidance_scale: float
    made: Future[torch.Tensor] = field(default_factory=Future, compare=False)
    """Its latents, float32 [length, d] on the CPU. Cancelled before its batch begins it is not
    made."""

    @property
    def together(self) -> tuple[float, float]:
        """What is one for a whole batch."""
        return self.temperature, self.guidance_scale


class Batches:
    """Made by a thread of its own, until :meth:`close`."""

    def __init__(
        self, folder: LatentsFolder, recipe: Recipe, most: int, device: str | torch.device = "cpu"
    ):
        """``most``: pictures of a batch. ValueError with one sentence if ``recipe`` does not fit
        the models in ``folder``."""
        recipe.way(folder)  # refuses what cannot be
        self.folder, self.recipe = folder, recipe
        self._most, self._device = most, torch.device(device)
        for model in (folder.target, folder.draft):
            model.to(self._device)
        self._waiting: deque[Wish] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def ask(self, wish: Wish) -> None:
        """``wish.made`` will hold it."""
        with self._changed:
            self._waiting.append(wish)
            self._changed.notify()

    def close(self) -> None:
        """The batch that is being made is the last one; who still waits is cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for wish in self._waiting:
            wish.made.cancel()

    def _run(self) -> None:
        while batch := self._next():
            wanted = [wish for wish in batch if wish.made.set_running_or_notify_cancel()]
            if not wanted:
                continue
            try:
                latents = self._make(wanted)
            except Exception as error:  # whoever asked hears of it; others go on
                logger.exception("a batch of %d pictures failed", len(wanted))
                for wish in wanted:
                    wish.made.set_exception(error)
                continue
            for wish, own in zip(wanted, latents, strict=True):
                if own.isfinite().all():
                    wish.made.set_result(own)
                else:
                    wish.made.set_exception(ValueError(
                        "the picture left the range of a float: lower 'guidance_scale'"
                    ))  # fmt: skip

    def _next(self) -> list[Wish]:
        """Those that go with the one that has waited longest, as they came; none: it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return []
            first = self._waiting[0].together
            batch = [wish for wish in self._waiting if wish.together == first][: self._most]
            taken = set(map(id, batch))
            self._waiting = deque(wish for wish in self._waiting if id(wish) not in taken)
            return batch

    def _make(self, wanted: list[Wish]) -> torch.Tensor:
        temperature, scale = wanted[0].together
        own = {"temperature": temperature, "guidance_scale": scale}
        recipe = Recipe.model_validate(self.recipe.model_dump() | own)
        labels = torch.tensor([wish.label for wish in wanted], device=self._device)
        latents, _ = recipe.way(self.folder)(labels, [wish.seed for wish in wanted])
        return latents.cpu()
