"""Pictures in, by a recipe: whole batches on one device, without vLLM.

:class:`PictureMaker` is the runner for one device; ``ray_generation.py`` spreads pictures over
many. A picture depends on its label, its seed and the recipe, not on what it is made with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from vllm_specplus.control.requests import MOST_GUIDANCE
from vllm_specplus.image.continuous.acceptance import Rule
from vllm_specplus.image.continuous.decoding import (
    CausalModel,
    Counts,
    Guided,
    Settings,
    Speculation,
    decode,
    decode_speculative,
)
from vllm_specplus.image.continuous.folder import LatentsFolder
from vllm_specplus.image.continuous.masked import (
    Guidance,
    MaskedSpeculation,
    decode_masked,
    decode_masked_speculative,
    known_latents,
)
from vllm_specplus.image.vq import to_bytes
from vllm_specplus.strict import StrictModel

#: The hottest, as of requests to vLLM. Hotter pictures leave the range of a float.
MOST_TEMPERATURE = 2.0

#: Labels int64 [B] and seeds [B] to latents float32 [B, length, d], and what it took: counts, or
#: passes of the target per picture.
Way = Callable[[torch.Tensor, list[int]], tuple[torch.Tensor, Counts | float]]


class Cspd(StrictModel):
    """How CSpD drafts and judges."""

    window: int = 8
    """Latents (of a masked model: iterations) drafted per pass."""
    rule: Rule = "exact"
    prefill: int = 0
    steps: Annotated[int, Field(ge=1)] | None = None
    """Of the draft's chains; None: the target's."""
    aligned: bool | None = None
    """Of causal models; by default they are."""
    contexts: Literal["own", "shared"] | None = None
    """Of masked models; by default their own."""


class Recipe(StrictModel):
    """How pictures are drawn."""

    cspd: Cspd | None = None
    """None: by the target alone."""
    iterations: int | None = None
    """Of masked models; None: the model's own."""
    temperature: Annotated[float, Field(gt=0, le=MOST_TEMPERATURE)] = 1.0
    guidance_scale: Annotated[float, Field(ge=0, le=MOST_GUIDANCE)] = 1.0
    guidance_schedule: Literal["linear", "constant"] | None = None
    """Of masked models, see :class:`~.masked.Guidance`; by default it is linear."""

    def way(self, folder: LatentsFolder) -> Way:
        """ValueError if it does not fit the models in ``folder``."""
        settings = Settings(
            folder.length, folder.size, folder.schedule, temperature=self.temperature
        )
        return self._masked(folder, settings) if folder.masked else self._causal(folder, settings)

    def _causal(self, folder: LatentsFolder, settings: Settings) -> Way:
        if self.iterations is not None:
            raise ValueError("iterations is for masked models: remove it")
        if self.guidance_schedule is not None:
            raise ValueError("guidance_schedule is for masked models: remove it")
        target, draft = (self._guided(folder, each) for each in (folder.target, folder.draft))
        if self.cspd is None:
            passes = float(folder.length)
            return lambda labels, seeds: (decode(target, labels, seeds, settings), passes)
        if self.cspd.contexts is not None:
            raise ValueError("contexts is for masked models: remove it")
        how = self.cspd
        aligned = how.aligned is not False
        speculation = Speculation(how.window, how.rule, how.prefill, aligned, how.steps)
        settings.drafting(how.steps)  # refuses what cannot be
        return lambda labels, seeds: decode_speculative(
            target, draft, labels, seeds, settings, speculation
        )

    def _guided(self, folder: LatentsFolder, model: CausalModel) -> CausalModel:
        if self.guidance_scale == 1:
            return model
        return Guided(model, folder.num_classes, self.guidance_scale)

    def _masked(self, folder: LatentsFolder, settings: Settings) -> Way:
        iterations = self.iterations
        if iterations is None:
            iterations = min(folder.target.config.iterations, settings.length)
        known_latents(settings.length, iterations)  # refuses what cannot be
        guidance = None
        if self.guidance_scale != 1:
            guidance = Guidance(self.guidance_scale, self.guidance_schedule or "linear")
        target, draft = folder.target, folder.draft
        if self.cspd is None:
            return lambda labels, seeds: (
                decode_masked(target, labels, seeds, settings, iterations, guidance),
                float(iterations),
            )
        if self.cspd.aligned is not None:
            raise ValueError("aligned is for causal models: remove it")
        how = self.cspd
        contexts = how.contexts or "own"
        speculation = MaskedSpeculation(how.window, contexts, how.rule, how.prefill, how.steps)
        settings.drafting(how.steps)  # refuses what cannot be
        return lambda labels, seeds: decode_masked_speculative(
            target, draft, labels, seeds, settings, iterations, speculation, guidance
        )


class PictureMaker:
    """Makes pictures of the models in a folder, on one device."""

    def __init__(self, folder: str | Path, recipe: Recipe, device: str = "cpu"):
        """ValueError or FileNotFoundError if they do not go together."""
        self.folder = LatentsFolder.load(folder)
        self._way = recipe.way(self.folder)
        self._device = torch.device(device)
        for model in (self.folder.target, self.folder.draft, self.folder.vae):
            model.to(self._device)

    @torch.inference_mode()
    def __call__(self, labels: list[int], seeds: list[int]) -> np.ndarray:
        """uint8 [N, height, width, channels] of one batch."""
        classes = self.folder.num_classes
        if wrong := [label for label in labels if not 0 <= label < classes]:
            raise ValueError(f"label {wrong[0]}: the model's are 0 to {classes - 1}")
        if len(labels) != len(seeds):
            raise ValueError(f"{len(labels)} labels and {len(seeds)} seeds: one each is needed")
        latents, _ = self._way(torch.tensor(labels, device=self._device), seeds)
        return to_bytes(self.folder.vae.decode(latents)).cpu().numpy()
