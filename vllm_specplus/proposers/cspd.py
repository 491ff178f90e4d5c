"""Continuous speculative decoding: a smaller model drafts latents (CSpD, arXiv 2411.11925).

The target emits continuous latents by a diffusion head (``engine/models/latents.py``). A smaller
causal model draws the next ones one by one, with the noise that the target will have at their
places (trajectory alignment, section 4.2); the target then denoises all of them in one step,
and accepts or replaces them from left to right (``image/continuous/acceptance.py``).

Nodes are placeholder tokens, the latents go into the requests' slots. The draft keeps keys and
values of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from vllm_specplus.config import Megabytes, MethodConfig
from vllm_specplus.files import is_file, read_json
from vllm_specplus.image.continuous.causal import CausalLatents
from vllm_specplus.image.continuous.decoding import CausalModel, Guided, draft_chains
from vllm_specplus.image.continuous.slots import LatentSlots
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.registry import register_method
from vllm_specplus.step import Source, StepContext
from vllm_specplus.strict import quoted
from vllm_specplus.target import Target
from vllm_specplus.tree import DraftBatch


class CspdConfig(MethodConfig):
    """``{"method": "cspd", "model": "...", ...}``."""

    fuses: ClassVar[bool] = False
    drafts_latents: ClassVar[bool] = True

    method: Literal["cspd"] = "cspd"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 4
    """Latents drafted per step, at most."""
    model: str
    """Folder of the draft, a smaller causal model of the same latents."""
    verification: Literal["exact", "paper", "reference"] = "exact"
    """How a drafted latent is judged; see ``image/continuous/acceptance.py``."""
    prefill: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """First latents of a picture that are not drafted."""
    steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Denoising steps of a drafted latent; by default the target's."""
    kv_memory_mb: Megabytes = 512
    """The draft's own keys and values; requests beyond it go undrafted."""

    @property
    def accepts_by(self) -> str:
        return self.verification

    @property
    def lossless(self) -> bool:
        return self.verification == "exact"

    @model_validator(mode="after")
    def _loss_is_wanted(self):
        if self.acceptance.rule != "lossless":
            raise ValueError("'acceptance' is for tokens, and latents have 'verification': use it")
        if self.lossless and self.allow_lossy:
            raise ValueError("'allow_lossy' is for a 'verification' that is not exact: remove it")
        if not self.lossless and not self.allow_lossy:
            raise ValueError(
                f"verification {self.verification!r} changes what is made: set 'allow_lossy' to "
                f"true if that is wanted"
            )
        return self

    @model_validator(mode="after")
    def _model_is_there(self):
        self._draft()
        return self

    def _draft(self) -> dict[str, Any]:
        path = Path(self.model) / "config.json"
        if not is_file(path):
            raise ValueError(f"'model' {quoted(self.model)} is not a folder with a config.json")
        return read_json(path, f"'model' {quoted(self.model)}: its config.json")

    def check_target(self, target: Target) -> None:
        draft = self._draft()
        if self.steps is not None and self.steps > target.latents["steps"]:
            raise ValueError(
                f"'steps' is {self.steps}, and the target takes {target.latents['steps']}: lower it"
            )
        for key in ("model_type", "num_classes", "grid_size", "size", "end", "prediction"):
            if draft.get(key) != target.latents.get(key):
                raise ValueError(
                    f"'model' {quoted(self.model)} does not draft for this target: its {key!r} is "
                    f"{quoted(draft.get(key))}, and the target's is {target.latents.get(key)!r}"
                )


@register_method
class Cspd(Proposer):
    config_class = CspdConfig
    sources = (Source("window", "draft", 0.5),)

    def __init__(self, config: CspdConfig, services: Services):
        super().__init__(config, services)
        # Every place of the window is a pass of the draft: how many pay is decided before.
        self.levels = (1,) * config.num_speculative_tokens
        self._model: CausalModel
        self._session: Any = None
        self._capacity = 0
        self._pictures: dict[str, int] = {}

    def load_draft(self, device: torch.device, dtype: torch.dtype) -> None:
        # In float32 like the target's head: densities are compared.
        self._draft = CausalLatents.load(self.config.model).to(device)

    def held_bytes(self) -> int:
        return self.config.kv_memory_mb << 20

    @torch.inference_mode()
    def propose(self, step: StepContext) -> DraftBatch:
        slots, index = step.latents.slots, step.latents.index
        self._begin(slots)
        here = index < self._capacity
        known = step.num_tokens.astype(np.int64) - 1  # the prompt is a label
        device = slots.labels.device
        done = torch.full((self._capacity,), slots.settings.length, device=device)
        done[torch.from_numpy(index[here]).to(device)] = torch.from_numpy(known[here]).to(device)
        # Every step, drafting or not: what was drafted and rejected is forgotten.
        self._session.keep(done)
        counts = np.where(here & (known >= self.config.prefill), step.max_nodes, 0).astype(np.int64)
        drafting = np.flatnonzero(counts)
        if not len(drafting):
            return DraftBatch.empty(len(counts))
        for r in drafting.tolist():
            self._enter(step.request_ids[r], int(index[r]), slots)
        active = torch.from_numpy(index[drafting]).to(device)
        room = torch.from_numpy(counts[drafting]).to(device)
        chains = draft_chains(
            self._model, self._session, slots.latents, active, done, room, slots.noise,
            self._settings,
        )  # fmt: skip
        slots.set_drafts(index[drafting], known[drafting], counts[drafting], chains)
        total = int(counts.sum())
        ends = np.cumsum(counts)
        parents = np.arange(total) - np.repeat(ends - counts, counts) - 1
        return DraftBatch(
            np.zeros(total, np.int32), parents.astype(np.int32), counts.astype(np.int32),
            np.zeros(total, np.int32),
        )  # fmt: skip

    def _begin(self, slots: LatentSlots) -> None:
        """A session for as many slots as there are, and as the memory allows."""
        config, length = self._draft.config, slots.settings.length
        branches = 2 if slots.guided else 1
        kv = config.num_key_value_heads * config.head_dim
        picture = 2 * 4 * config.num_hidden_layers * length * kv * branches
        capacity = min(len(slots), (self.config.kv_memory_mb << 20) // picture)
        if self._session is not None and capacity == self._capacity:
            return
        # What it has read before is read again: keys and values are only remembered.
        self._capacity, self._pictures = capacity, {}
        model = self._draft
        if slots.guided:
            model = Guided(model, config.num_classes, slots.guidance[:capacity])
        self._model, self._settings = model, slots.settings.drafting(self.config.steps)
        self._session = model.begin(slots.labels[:capacity], length)

    def _enter(self, request_id: str, slot: int, slots: LatentSlots) -> None:
        if request_id not in self._pictures:
            self._session.restart(slot, int(slots.labels[slot]))
            self._pictures[request_id] = slot

    def forget(self, request_id: str) -> None:
        self._pictures.pop(request_id, None)
