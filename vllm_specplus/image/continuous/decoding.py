"""Generation of latents in raster order by any causal model, plain and speculative.

CSpD (arXiv 2411.11925, algorithm 1). A pass verifies a window of drafted latents from left to
right; the first rejected one is replaced, and what was drafted behind it is thrown away. Every
picture goes at its own pace.

A discarded position is drafted again with the noise it had. That is harmless: nothing decided
before it has looked at that noise.

A model is asked through a :class:`Session`. :class:`Recompute` is the naive one, which reads
whole pictures at every pass; models bring faster ones (``causal.py``'s keeps keys and values).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from vllm_specplus.image.continuous.acceptance import Rule, Verdict, judge
from vllm_specplus.image.continuous.chain import (
    Chain,
    DiffusionHead,
    Noise,
    Schedule,
    along,
    denoise,
    picture_noise,
    stack,
)


class Session(Protocol):
    """What a model remembers of a batch of pictures."""

    def conditions(
        self, latents: torch.Tensor, pictures: torch.Tensor, first: torch.Tensor, count: int
    ) -> torch.Tensor:
        """Of the positions ``first`` int64 [P] and the ``count - 1`` behind it (clipped to the
        picture's last) of ``pictures`` int64 [P]: [P, count, c]. A position's condition is from the
        label and the latents before it in ``latents`` float32 [P, length, d]."""
        ...

    def keep(self, known: torch.Tensor) -> None:
        """Only the first ``known`` int64 [B] latents of each picture stay as they are."""
        ...

    def restart(self, picture: int, label: int) -> None:
        """Another picture, of class ``label``, takes the place of one."""
        ...


class CausalModel(Protocol):
    head: DiffusionHead

    def begin(self, labels: torch.Tensor, length: int) -> Session:
        """For pictures of the classes ``labels`` int64 [B] and ``length`` latents."""
        ...


class Recompute:
    """Of any model with ``conditions(latents [B, n, d], labels [B]) -> [B, n + 1, c]``."""

    def __init__(self, model, labels: torch.Tensor):
        self.model, self.labels = model, labels

    def conditions(self, latents, pictures, first, count):
        every = self.model.conditions(latents[:, :-1], self.labels[pictures])
        positions = first[:, None] + torch.arange(count, device=first.device)
        positions = positions.clamp(max=latents.shape[1] - 1)
        return every[torch.arange(len(pictures), device=first.device)[:, None], positions]

    def keep(self, known):
        pass

    def restart(self, picture, label):
        self.labels[picture] = label


class Guided:
    """A model with classifier-free guidance (MAR, arXiv 2406.11838, section 4.4): what the head
    predicts becomes ``any + scale (label - any)``; variances are those of the label.

    A condition is the two of label and ``anything``, the label that stands for all, and the
    scale, in a row.
    """

    def __init__(self, model: CausalModel, anything: int, scale: float | torch.Tensor):
        """``scale``: of all pictures, or float32 [B] of each."""
        self.model, self.anything, self.scale = model, anything, scale
        self.head = GuidedHead(model.head)

    def begin(self, labels: torch.Tensor, length: int) -> GuidedSession:
        other = torch.full_like(labels, self.anything)
        scale = self.scale
        if isinstance(scale, float | int):
            scale = torch.full((len(labels),), float(scale), device=labels.device)
        session = self.model.begin(torch.cat((labels, other)), length)
        return GuidedSession(session, self.anything, scale)


class GuidedHead:
    """Of conditions as :class:`Guided` has them."""

    def __init__(self, head: DiffusionHead):
        self.head = head

    def __call__(
        self, x: torch.Tensor, times: torch.Tensor, condition: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        times = times if len(times) == 1 else times.repeat(2)
        say = partial(self.head, times=times, condition=self._both(condition))
        return self._mix(say, condition[:, -1:], x)

    def along(self, times: torch.Tensor, condition: torch.Tensor):
        for say in along(self.head, times, self._both(condition)):
            yield partial(self._mix, say, condition[:, -1:])

    @staticmethod
    def _both(condition: torch.Tensor) -> torch.Tensor:
        return torch.cat(condition[:, :-1].chunk(2, -1))

    @staticmethod
    def _mix(say, scale: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        said, fraction = say(x.repeat(2, 1))
        label, other = said.chunk(2)
        return other + scale * (label - other), fraction[: len(x)]


class GuidedSession:
    """Pictures twice in one session."""

    def __init__(self, session: Session, anything: int, scale: torch.Tensor):
        """``scale`` float32 [B]: may change between calls."""
        self.session, self.anything, self.scale = session, anything, scale

    def conditions(self, latents, pictures, first, count):
        both = torch.cat((pictures, pictures + len(self.scale)))
        out = self.session.conditions(latents.repeat(2, 1, 1), both, first.repeat(2), count)
        scale = self.scale[pictures][:, None, None].expand(-1, count, 1)
        return torch.cat((*out.chunk(2), scale), -1)

    def keep(self, known):
        self.session.keep(known.repeat(2))

    def restart(self, picture, label):
        self.session.restart(picture, label)
        self.session.restart(picture + len(self.scale), self.anything)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a picture is drawn."""

    length: int
    """Latents of a picture."""
    size: int
    """Channels of a latent, d."""
    schedule: Schedule
    temperature: float | torch.Tensor = 1.0
    """Factor of all sigmas: of all pictures, or float32 [B] of each."""

    def drafting(self, steps: int | None) -> Settings:
        """The same with chains of so many steps."""
        return self if steps is None else replace(self, schedule=self.schedule.shortened(steps))


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
    steps: int | None = None
    """Of the draft's chains; None: the target's. With fewer ``exact`` stays exact, too: given the
    noise either model's latent is a Gaussian, whatever way led there."""

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window={self.window}: at least 1 latent is drafted per pass")
        if self.prefill < 0:
            raise ValueError(f"prefill={self.prefill}: a number of latents, 0 for none")


@dataclass(slots=True)
class Counts:
    """By picture, int64 [B], but for the last two."""

    target_passes: torch.Tensor
    drafted: torch.Tensor
    accepted: torch.Tensor
    rejected: torch.Tensor
    """Replaced by a residual. What was drafted behind one and discarded is in neither."""
    proposals: torch.Tensor
    """Of residuals."""
    given_up: torch.Tensor
    """Residuals that ended at the bound of proposals."""
    judged_at: torch.Tensor
    accepted_at: torch.Tensor
    """int64 [length], of all pictures: drafts that were judged, and accepted, at every place in the
    order in which a picture is drawn."""

    @classmethod
    def of(cls, labels: torch.Tensor, length: int) -> Counts:
        """Zeros, for pictures of ``labels`` int64 [B] and ``length`` latents."""
        places = (labels.new_zeros(length) for _ in range(2))
        return cls(*(torch.zeros_like(labels) for _ in range(6)), *places)

    def add(
        self, pictures: torch.Tensor, first: torch.Tensor, room: torch.Tensor, verdict: Verdict
    ) -> None:
        """What came of a pass over windows of ``room`` int64 [P] drafts, from place ``first`` int64
        [P] on, of ``pictures`` int64 [P]."""
        self.target_passes[pictures] += 1
        self.drafted[pictures] += room
        self.accepted[pictures] += verdict.accepted
        self.rejected[pictures] += verdict.rejected.long()
        self.proposals[pictures] += verdict.proposals
        self.given_up[pictures] += verdict.given_up.long()
        judged = verdict.accepted + verdict.rejected.long()
        offset = torch.arange(int(judged.max()), device=judged.device)
        here = offset < judged[:, None]
        taken = offset < verdict.accepted[:, None]
        self.add_places((first[:, None] + offset)[here], taken[here])

    def add_places(self, places: torch.Tensor, taken: torch.Tensor) -> None:
        """Of judged drafts at ``places`` int64 [n], accepted where ``taken`` bool [n]."""
        length = len(self.judged_at)
        self.judged_at += torch.bincount(places, minlength=length)
        self.accepted_at += torch.bincount(places[taken], minlength=length)

    @property
    def acceptance(self) -> float:
        """Share of the judged drafts that was accepted."""
        accepted = self.accepted.sum()
        return float(accepted / (accepted + self.rejected.sum()).clamp(min=1))


def noise_of(
    seeds: list[int], settings: Settings, device: torch.device | str = "cpu"
) -> Noise:  # fmt: skip
    """[B, length, ...]"""
    shape = (settings.length, settings.schedule.steps, settings.size)
    return stack([picture_noise(seed, *shape) for seed in seeds], device)


@torch.inference_mode()
def decode(
    model: CausalModel, labels: torch.Tensor, seeds: list[int], settings: Settings
) -> torch.Tensor:
    """Latents float32 [B, length, d] of the classes ``labels`` int64 [B], on their device."""
    noise = noise_of(seeds, settings, labels.device)
    session = model.begin(labels, settings.length)
    pictures = torch.arange(len(labels), device=labels.device)
    latents = torch.zeros_like(noise.start)
    for i in range(settings.length):
        first = torch.full_like(pictures, i)
        condition = session.conditions(latents, pictures, first, 1)[:, 0]
        latents[:, i] = chain_of(model, condition, noise[:, i], settings, pictures).sample
    return latents


@torch.inference_mode()
def decode_speculative(
    target: CausalModel, draft: CausalModel, labels: torch.Tensor, seeds: list[int],
    settings: Settings, speculation: Speculation,
) -> tuple[torch.Tensor, Counts]:  # fmt: skip
    """Latents as of :func:`decode`, and what it took."""
    noise = draft_noise = noise_of(seeds, settings, labels.device)
    if not speculation.aligned:
        draft_noise = noise_of([hash((seed, -1)) for seed in seeds], settings, labels.device)
    draft_settings = settings.drafting(speculation.steps)
    length = settings.length
    sessions = target.begin(labels, length), draft.begin(labels, length)
    latents = torch.zeros_like(noise.start)
    done, counts = torch.zeros_like(labels), Counts.of(labels, length)
    while (active := (done < length).nonzero()[:, 0]).numel():
        # The target's own latent ends every pass, so one less than is missing is drafted.
        room = (length - done - 1).clamp(max=speculation.window)
        room = torch.where(done < speculation.prefill, 0, room)[active]
        drafts = draft_chains(
            draft, sessions[1], latents, active, done, room, draft_noise, draft_settings
        )  # fmt: skip
        # [A, window + 1]: the drafted positions and the one behind them.
        offset = torch.arange(int(room.max()) + 1, device=labels.device)
        wanted = offset <= room[:, None]
        conditions = sessions[0].conditions(latents[active], active, done[active], len(offset))
        which, position = (x[wanted] for x in torch.broadcast_tensors(
            active[:, None], done[active, None] + offset))  # fmt: skip
        own = noise[which, position]
        chains = chain_of(target, conditions[wanted], own, settings, which)
        verdict = judge(
            drafts, chains, own.uniforms, room, [seeds[b] for b in active.tolist()],
            done[active], speculation.rule,
        )  # fmt: skip
        latents[active, done[active] + verdict.accepted] = verdict.latent
        counts.add(active, done[active], room, verdict)
        done[active] += verdict.accepted + 1
        for session in sessions:
            session.keep(done)
    return latents, counts


def draft_chains(
    draft: CausalModel, session: Session, latents: torch.Tensor, active: torch.Tensor,
    done: torch.Tensor, room: torch.Tensor, noise: Noise, settings: Settings,
) -> Chain:  # fmt: skip
    """Draft into ``latents`` [B, length, d] behind ``done`` int64 [B], ``room`` int64 [A] each
    for the ``active`` int64 [A] pictures: ``sum(room)`` chains, picture by picture."""
    starts = room.cumsum(0) - room
    total = (int(room.sum()), settings.size)
    vectors = [torch.zeros(total, device=latents.device) for _ in range(3)]
    out = Chain(*vectors, torch.zeros(total[:1], device=latents.device))
    for offset in range(int(room.max())):
        rows = (offset < room).nonzero()[:, 0]
        pictures = active[rows]
        positions = done[pictures] + offset
        condition = session.conditions(latents[pictures], pictures, positions, 1)[:, 0]
        chain = chain_of(draft, condition, noise[pictures, positions], settings, pictures)
        latents[pictures, positions] = chain.sample
        for part in ("sample", "mean", "log_sigma", "path_log_sigma"):
            getattr(out, part)[starts[rows] + offset] = getattr(chain, part)
    return out


def chain_of(
    model: CausalModel, condition: torch.Tensor, noise: Noise, settings: Settings,
    pictures: torch.Tensor,
) -> Chain:  # fmt: skip
    """The chains of n latents of ``pictures`` int64 [n]."""
    temperature = settings.temperature
    if torch.is_tensor(temperature):
        temperature = temperature[pictures, None]
    return denoise(model.head, settings.schedule, condition, noise, temperature)
