"""Generation of latents in raster order by any causal model, plain and speculative.

The plain statement of the method (CSpD, arXiv 2411.11925, algorithm 1): every pass reads
the whole picture, nothing is cached. A pass verifies a window of drafted latents from left to
right; the first rejected one is replaced, and what was drafted behind it is thrown away.

A discarded position is drafted again with the noise it had. That is harmless: nothing decided
before it has looked at that noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_specplus.image.continuous.acceptance import Rule, log_ratio, residual
from vllm_specplus.image.continuous.chain import (
    Chain,
    DiffusionHead,
    Noise,
    Schedule,
    denoise,
    picture_noise,
    stack,
)


class CausalModel(Protocol):
    head: DiffusionHead

    def conditions(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of the latent after the label and after each of ``latents`` float32 [B, n, d]:
        [B, n + 1, c], row i from the label and the latents before i alone."""
        ...


@dataclass(frozen=True, slots=True)
class Settings:
    """How a picture is drawn."""

    length: int
    """Latents of a picture."""
    size: int
    """Channels of a latent, d."""
    schedule: Schedule
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Speculation:
    """How it is drafted."""

    window: int
    """Latents drafted per pass of the target, at most."""
    rule: Rule = "exact"
    prefill: int = 0
    """First latents of a picture that are not drafted."""
    aligned: bool = True
    """Draft with the target's noise. Without, ``exact`` stays exact and accepts less."""

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window={self.window}: at least 1 latent is drafted per pass")
        if self.prefill < 0:
            raise ValueError(f"prefill={self.prefill}: a number of latents, 0 for none")


@dataclass(slots=True)
class Counts:
    """By picture, int64 [B]."""

    target_passes: torch.Tensor
    drafted: torch.Tensor
    accepted: torch.Tensor
    rejected: torch.Tensor
    """Replaced by a residual. What was drafted behind one and discarded is in neither."""
    proposals: torch.Tensor
    """Of residuals."""
    given_up: torch.Tensor
    """Residuals that ended at the bound of proposals."""

    @property
    def acceptance(self) -> float:
        """Share of the judged drafts that was accepted."""
        accepted = self.accepted.sum()
        return float(accepted / (accepted + self.rejected.sum()).clamp(min=1))


def noise_of(seeds: list[int], settings: Settings) -> Noise:
    """[B, length, ...]"""
    shape = (settings.length, settings.schedule.steps, settings.size)
    return stack([picture_noise(seed, *shape) for seed in seeds])


@torch.inference_mode()
def decode(
    model: CausalModel, labels: torch.Tensor, seeds: list[int], settings: Settings
) -> torch.Tensor:
    """Latents float32 [B, length, d] of the classes ``labels`` int64 [B]."""
    noise = noise_of(seeds, settings)
    latents = torch.zeros((len(labels), settings.length, settings.size))
    for i in range(settings.length):
        condition = model.conditions(latents[:, :i], labels)[:, i]
        latents[:, i] = _chain(model, condition, noise[:, i], settings).sample
    return latents


@torch.inference_mode()
def decode_speculative(
    target: CausalModel, draft: CausalModel, labels: torch.Tensor, seeds: list[int],
    settings: Settings, speculation: Speculation,
) -> tuple[torch.Tensor, Counts]:  # fmt: skip
    """Latents as of :func:`decode`, and what it took. Every picture goes at its own pace."""
    noise = noise_of(seeds, settings)
    draft_noise = noise
    if not speculation.aligned:
        draft_noise = noise_of([hash((seed, -1)) for seed in seeds], settings)
    pictures, length = len(labels), settings.length
    latents = torch.zeros((pictures, length, settings.size))
    done = torch.zeros(pictures, dtype=torch.long)
    counts = Counts(*(torch.zeros(pictures, dtype=torch.long) for _ in range(6)))
    while (active := (done < length).nonzero()[:, 0]).numel():
        # The target's own latent ends every pass, so one less than is missing is drafted.
        room = (length - done - 1).clamp(max=speculation.window)
        room = torch.where(done < speculation.prefill, 0, room)
        drafts = _draft(draft, latents, done, room, labels, draft_noise, settings)
        # Rows [n] of all pictures: the drafted positions and the one behind them.
        picture = torch.repeat_interleave(active, room[active] + 1)
        offset = torch.cat([torch.arange(k + 1) for k in room[active].tolist()])
        position = done[picture] + offset
        conditions = target.conditions(latents[:, :-1], labels)[picture, position]
        chains = _chain(target, conditions, noise[picture, position], settings)
        drafted = offset < room[picture]
        taken = torch.zeros(len(picture), dtype=torch.bool)
        if drafted.any():
            q = drafts[picture[drafted], offset[drafted]]
            uniforms = noise.uniforms[picture, position][drafted]
            taken[drafted] = uniforms.log() < log_ratio(q, chains[drafted], speculation.rule)
        # Rows before a picture's first rejection, and the row at which it ends.
        ends = torch.cumsum(room[active] + 1, 0) - 1
        for number, end in zip(active.tolist(), ends.tolist(), strict=True):
            most = int(room[number])
            run = taken[end - most : end].long()
            length_taken = int(run.cumprod(0).sum())
            row, place = end - most + length_taken, int(done[number]) + length_taken
            counts.target_passes[number] += 1
            counts.drafted[number] += most
            counts.accepted[number] += length_taken
            if length_taken < most:
                own = torch.Generator().manual_seed(hash((seeds[number], place)) % 2**63)
                pair = drafts[[number], [length_taken]], chains[[row]]
                instead = residual(*pair, [own], speculation.rule)
                latents[number, place] = instead.sample[0]
                counts.rejected[number] += 1
                counts.proposals[number] += instead.proposals[0]
                counts.given_up[number] += instead.given_up[0].long()
            else:
                latents[number, place] = chains.sample[row]
            done[number] = place + 1
    return latents, counts


def _draft(draft, latents, done, room, labels, noise, settings) -> Chain:
    """Draft into ``latents`` behind ``done``, ``room`` [B] each: chains [B, max(room)]."""
    shape = (len(latents), int(room.max()))
    vectors = [torch.zeros((*shape, settings.size)) for _ in range(3)]
    out = Chain(*vectors, torch.zeros(shape))
    for offset in range(shape[1]):
        pictures = (offset < room).nonzero()[:, 0]
        positions = done[pictures] + offset
        conditions = draft.conditions(latents[:, :-1], labels)[pictures, positions]
        chain = _chain(draft, conditions, noise[pictures, positions], settings)
        latents[pictures, positions] = chain.sample
        for part in ("sample", "mean", "log_sigma", "path_log_sigma"):
            getattr(out, part)[pictures, offset] = getattr(chain, part)
    return out


def _chain(model: CausalModel, condition, noise: Noise, settings: Settings) -> Chain:
    return denoise(model.head, settings.schedule, condition, noise, settings.temperature)
