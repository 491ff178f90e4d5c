"""What the requests of an engine have drawn so far: a slot each, on the device.

For vLLM a latent is a placeholder token. The latents themselves are here, by request and position,
from a request's first step until it is gone, however often it is preempted in between.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import torch

from vllm_specplus.image.continuous.acceptance import Rule, judge
from vllm_specplus.image.continuous.chain import Chain, Noise, picture_noise
from vllm_specplus.image.continuous.decoding import CausalModel, Settings, chain_of


@dataclass(frozen=True, slots=True)
class Picture:
    """What a request asks for."""

    label: int
    seed: int
    temperature: float
    guidance: float


@dataclass(frozen=True, slots=True)
class Drawn:
    """What the R requests of a step got."""

    lengths: np.ndarray
    """int64 [R] latents"""
    broken: np.ndarray
    """bool [R]: the last of them is a 0 that stands for one that is not finite."""
    given_up: int
    """Residuals, see ``acceptance.Residual``."""


@dataclass(frozen=True, slots=True)
class Windows:
    """The positions that a step verifies, of R requests; on the host."""

    slot: np.ndarray
    """int64 [R]"""
    first: np.ndarray
    """int64 [R] the position of each request's next latent."""
    count: np.ndarray
    """int64 [R] positions from there on; all but the first read a draft."""


class LatentSlots:
    """``S`` slots, twice as many whenever they run out."""

    def __init__(
        self, settings: Settings, slots: int, window: int, guided: bool, device: torch.device
    ):
        """``settings``: all but the temperature, which is by slot; ``window``: most drafts of a
        request, 0 for none; ``guided``: is ``guidance`` in use?"""
        length, size, steps = settings.length, settings.size, settings.schedule.steps

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros((slots, *shape), dtype=dtype, device=device)

        self.latents = zeros(length, size)
        """float32 [S, length, d]: of each position, known or drafted; 0 where neither."""
        self.noise = Noise(zeros(length, size), zeros(length, steps, size), zeros(length))
        self.guided = guided
        self.labels = zeros(dtype=torch.long)
        self.guidance = zeros()
        self.settings = Settings(length, size, settings.schedule, zeros())
        self.drafts = Chain(*(zeros(window, size) for _ in range(3)), zeros(window))
        """[S, window]: how the latents drafted last came about."""
        self.drafted = np.zeros((slots, 2), np.int64)
        """Position of the first latent drafted last, and how many; on the host."""
        self.seeds = [0] * slots
        self._slot_of: dict[str, int] = {}
        # The lowest first: a draft model's cache need not be larger than the batch.
        self._free = list(range(slots))

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slot_of

    def __len__(self) -> int:
        """Slots, taken or not."""
        return len(self.seeds)

    def tensors(self) -> list[torch.Tensor]:
        """All that is on the device, [S, ...] each."""
        chain = (self.drafts.sample, self.drafts.mean, self.drafts.log_sigma,
                 self.drafts.path_log_sigma)  # fmt: skip
        noise = (self.noise.start, self.noise.steps, self.noise.uniforms)
        by_slot = (self.labels, self.guidance, self.settings.temperature)
        return [self.latents, *noise, *by_slot, *chain]

    def take(self, request_id: str, picture: Picture) -> None:
        """A slot for a new request."""
        if not self._free:
            self._grow()
        slot = self._slot_of[request_id] = heapq.heappop(self._free)
        settings = self.settings
        noise = picture_noise(picture.seed, settings.length, settings.schedule.steps, settings.size)
        for part in ("start", "steps", "uniforms"):
            getattr(self.noise, part)[slot] = getattr(noise, part)
        self.labels[slot], self.guidance[slot] = picture.label, picture.guidance
        settings.temperature[slot] = picture.temperature
        self.seeds[slot] = picture.seed

    def free(self, request_id: str) -> None:
        """The request is gone, and nothing of it stays."""
        slot = self._slot_of.pop(request_id, None)
        if slot is None:
            return
        for tensor in self.tensors():
            tensor[slot] = 0
        self.drafted[slot] = self.seeds[slot] = 0
        heapq.heappush(self._free, slot)

    def _grow(self) -> None:
        slots = len(self)
        for tensor in self.tensors():
            # In place: whoever holds one of them sees the new slots.
            tensor.resize_(2 * slots, *tensor.shape[1:])
            tensor[slots:] = 0
        self.drafted = np.concatenate((self.drafted, np.zeros_like(self.drafted)))
        self.seeds += [0] * slots
        self._free = list(range(slots, 2 * slots))

    def of(self, request_ids: list[str]) -> np.ndarray:
        """int64 [R]"""
        return np.array([self._slot_of[name] for name in request_ids], np.int64)

    def inputs(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """float32 [n, d]: the latent before each of ``positions`` int64 [n], what a causal model
        reads there; at position 0, where it reads the label, any."""
        return self.latents[slots, (positions - 1).clamp(min=0)]

    def set_drafts(self, slots: np.ndarray, first: np.ndarray, count: np.ndarray, drafts: Chain):
        """``count`` int64 [R] latents were drafted from ``first`` int64 [R] on, ``sum(count)``
        in ``drafts``, request by request."""
        self.drafted[slots] = np.stack((first, count), 1)
        slot, position = self._device(np.repeat(slots, count)), self._device(_within(count))
        for part in ("sample", "mean", "log_sigma", "path_log_sigma"):
            getattr(self.drafts, part)[slot, position] = getattr(drafts, part)

    def verify(
        self, model: CausalModel, conditions: torch.Tensor, windows: Windows, discarded: np.ndarray,
        rule: Rule,
    ) -> Drawn:  # fmt: skip
        """Draw what the requests get in this step, which is in ``latents`` from ``first`` on.

        ``conditions`` [sum(count), c]: the target's at all positions of the windows.
        ``discarded`` bool [R]: requests that get nothing.
        """
        slot, first, count = windows.slot, windows.first, windows.count
        # Drafts that are not the ones made last are not looked at.
        known = (self.drafted[slot, 0] == first) & ~discarded
        room = np.where(known, np.minimum(count - 1, self.drafted[slot, 1]), 0)
        wanted = np.flatnonzero(_within(count) <= np.repeat(room, count))
        offset = _within(room + 1)
        judged = self._device(np.flatnonzero(offset < np.repeat(room, room + 1)))
        slots = self._device(np.repeat(slot, room + 1))
        positions = self._device(np.repeat(first, room + 1) + offset)
        noise = self.noise[slots, positions]
        chains = chain_of(model, conditions[self._device(wanted)], noise, self.settings, slots)
        drafts = self.drafts[slots[judged], self._device(_within(room))]
        seeds = [self.seeds[s] for s in slot.tolist()]
        verdict = judge(
            drafts, chains, noise.uniforms, self._device(room), seeds, self._device(first), rule
        )
        finite = verdict.latent.isfinite().all(-1)
        accepted, usable = torch.stack((verdict.accepted, finite.long())).cpu().numpy()
        drawn = np.flatnonzero(~discarded)
        position = self._device((first + accepted)[drawn])
        latent = verdict.latent.masked_fill(~finite[:, None], 0.0)
        self.latents[self._device(slot[drawn]), position] = latent[self._device(drawn)]
        return Drawn(accepted + 1, (usable == 0) & ~discarded, int(verdict.given_up.sum()))

    def _device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.labels.device)


def _within(count: np.ndarray) -> np.ndarray:
    """0, 1, ... of each of ``count`` int64 [R] in a row."""
    return np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
