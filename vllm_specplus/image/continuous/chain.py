"""The denoising chain of a latent, and the noise it is drawn with.

A latent ``x_0`` is the end of ``T`` Gaussian steps from ``x_T ~ N(0, I)`` on::

    x_{t-1} = mean_t(x_t) + sigma_t(x_t) eps_t,    eps_t ~ N(0, I)

with what a diffusion head says about ``x_t`` under the backbone's condition (MAR, arXiv
2406.11838, section 3.2; learned variances as in arXiv 2102.09672). *Trajectory alignment*
(CSpD, arXiv 2411.11925, section 4.2): every position of a picture has one noise, and draft
and target both denoise with it.

Unlike the released code, the last step draws too: a latent that sits on its own mean has no
density, and nothing about it can be exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from torch.nn import functional as F

#: Streams of a picture's random numbers: its noise, the order of its latents, and from there on
#: what replaces a rejected latent, by position.
NOISE, ORDER, RESIDUAL = range(3)


class DiffusionHead(Protocol):
    """Any module that predicts a denoising step."""

    def __call__(
        self, x: torch.Tensor, times: torch.Tensor, condition: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the schedule's ``prediction`` names, of ``x`` float32 [n, d] at ``times`` int64
        [n] (or [1], of all), and where its log-variance lies between the least and the most
        possible, -1 to 1; both [n, d]."""
        ...


@dataclass(frozen=True, slots=True)
class Noise:
    """What n latents are drawn with."""

    start: torch.Tensor
    """float32 [n, d]: ``x_T``."""
    steps: torch.Tensor
    """float32 [n, T, d]: ``eps_T`` .. ``eps_1``."""
    uniforms: torch.Tensor
    """float32 [n]: what acceptance is compared with."""

    def __getitem__(self, index) -> Noise:
        return Noise(self.start[index], self.steps[index], self.uniforms[index])

    def thinned(self, steps: int) -> Noise:
        """For chains of fewer steps: the last step's noise, and of the others some, evenly."""
        if steps == self.steps.shape[-2]:
            return self
        kept = torch.linspace(self.steps.shape[-2] - 1, 0, steps).round().long().flip(0)
        return Noise(self.start, self.steps[..., kept, :], self.uniforms)


def random_stream(seed: int, number: int) -> np.random.Generator:
    """Returns stream ``number`` (from 0 on) of the random numbers of a picture: all 64 bits of its
    ``seed`` count, and negative seeds are taken modulo 2^64. No two pairs share their numbers.

    Torch's generator for CPUs goes by the lower 32 bits of a seed.
    """
    return np.random.Generator(np.random.Philox(key=seed % 2**64 | number << 64))


def picture_noise(seed: int, length: int, steps: int, size: int) -> Noise:
    """Of all ``length`` latents of a picture: by its seed alone, whatever else is in the batch
    and however often a position is drafted. On the CPU; ``length * (steps + 1) * size`` floats.
    """
    stream = random_stream(seed, NOISE)
    normal = torch.from_numpy(stream.standard_normal((length, steps + 1, size), np.float32))
    uniforms = torch.from_numpy(stream.random(length, np.float32))
    return Noise(normal[:, 0], normal[:, 1:], uniforms)


def stack(noises: list[Noise], device: torch.device | str = "cpu") -> Noise:
    """Of several pictures: [B, length, ...]."""
    return Noise(
        *(
            torch.stack([getattr(noise, part) for noise in noises]).to(device)
            for part in ("start", "steps", "uniforms")
        )
    )


@dataclass(frozen=True, slots=True)
class Chain:
    """How n latents came about, in float32 whatever the model's dtype."""

    sample: torch.Tensor
    """[n, d]: ``x_0``."""
    mean: torch.Tensor
    """[n, d]: of the last step's Gaussian, ``mean_1(x_1)``."""
    log_sigma: torch.Tensor
    """[n, d]: of the last step's Gaussian."""
    path_log_sigma: torch.Tensor
    """[n]: log sigmas of the steps before it, summed over steps and channels."""

    def __getitem__(self, index) -> Chain:
        return Chain(
            self.sample[index], self.mean[index], self.log_sigma[index],
            self.path_log_sigma[index],
        )  # fmt: skip

    def log_density(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] of the last step's Gaussian at ``x`` [..., n, d]."""
        scaled = (x - self.mean) * torch.exp(-self.log_sigma)
        constant = 0.5 * math.log(2 * math.pi)
        return -(0.5 * scaled.square() + self.log_sigma + constant).sum(-1)


class Schedule:
    """The steps of a chain: ``steps`` of a cosine schedule (arXiv 2102.09672, equation 17) of
    ``trained`` steps, evenly spaced, from pure noise on.

    With ``end`` 0 a chain ends at the data, by the first trained step, as MAR's does. Its sigma
    is near 0.01: there two models disagree about every latent. With another it ends at data as
    noisy as after ``end`` trained steps, by a step of about that noise, for decoders that
    read noisy latents (a sigma-VAE's, arXiv 2412.08635).
    """

    def __init__(
        self, steps: int, trained: int = 1000, end: int = 0,
        prediction: Literal["noise", "velocity"] = "noise",
    ):  # fmt: skip
        """``prediction``: what the head says of a state. ``noise`` is MAR's and needs many
        steps: near pure noise its errors are multiplied by thousands. ``velocity`` (arXiv
        2202.00512, appendix D) is as good at any step."""
        if not 1 <= steps <= trained - end:
            raise ValueError(
                f"steps={steps}: a chain has 1 to {trained - end} of the {trained} trained steps"
            )
        self.steps, self.trained, self.end, self.prediction = steps, trained, end, prediction
        grid = torch.arange(trained + 1, dtype=torch.float64) / trained
        curve = torch.cos((grid + 0.008) / 1.008 * math.pi / 2).square()
        betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
        # What is left of the data's variance after 0 .. trained steps.
        left = torch.cat((torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)))
        nearest = 1.0 if end == 0 else end + (trained - end) / steps
        walked = torch.linspace(trained, nearest, steps, dtype=torch.float64).round().long()
        self.times = walked - 1
        """int64 [T] as the head counts them, from 0."""
        self.signal_at_end = float(left[end])
        """Share of the variance that is signal where chains end."""
        signal, before = left[walked], left[torch.cat((walked[1:], torch.tensor([end])))]
        beta = 1 - signal / before
        # The posterior's variance, the least a step can have; at time 0 it would be 0.
        least = beta * (1 - before) / (1 - signal)
        if least[-1] == 0:
            least[-1] = least[-2] if steps > 1 else beta[-1]
        self._signal, self._before, self._beta = signal.float(), before.float(), beta.float()
        # Clean data is linear in the state and in what the head says; so is then the mean.
        by_state, by_head = signal.sqrt(), -(1 - signal).sqrt()
        if prediction == "noise":
            by_state, by_head = 1 / signal.sqrt(), -(1 / signal - 1).sqrt()
        clean, state = before.sqrt() * beta, (1 - beta).sqrt() * (1 - before)
        self._by_state = ((clean * by_state + state) / (1 - signal)).float()
        self._by_head = (clean * by_head / (1 - signal)).float()
        # Log sigma at fraction 0, and how far it goes either way.
        self._log_middle = ((least.log() + beta.log()) / 4).float()
        self._log_reach = ((beta.log() - least.log()) / 4).float()
        self._log_true = (least.log() / 2).float()

    def shortened(self, steps: int) -> Schedule:
        """To the same end in fewer steps; ValueError for more."""
        if steps > self.steps:
            raise ValueError(f"steps={steps}: a draft has at most the target's {self.steps}")
        return Schedule(steps, self.trained, self.end, self.prediction)

    def step(
        self, i: int | torch.Tensor, x: torch.Tensor, said: torch.Tensor, fraction: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log sigma, [n, d], of step ``i`` (0 is the noisiest; or int64 [n]) from the
        two things that the head says about ``x``."""
        mean = self._at(self._by_state, i) * x + self._at(self._by_head, i) * said
        return mean, self._at(self._log_middle, i) + self._at(self._log_reach, i) * fraction

    def noised(self, i: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What step ``i`` int64 [n] starts from, [n, d], if a chain is to end at ``clean``."""
        signal = self._at(self._signal, i)
        return signal.sqrt() * clean + (1 - signal).sqrt() * noise

    def aim(self, i: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the head is to say about :meth:`noised`, [n, d]."""
        if self.prediction == "noise":
            return noise
        signal = self._at(self._signal, i)
        return signal.sqrt() * noise - (1 - signal).sqrt() * clean

    def bound(
        self, i: torch.Tensor, x: torch.Tensor, clean: torch.Tensor, said: torch.Tensor,
        fraction: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Nats per channel, [n, d], by which step ``i`` int64 [n] misses the true posterior of
        ``x`` given ``clean``: KL divergence of two Gaussians."""
        mean, log_sigma = self.step(i, x, said, fraction)
        true, true_log = self._posterior_mean(i, x, clean), self._at(self._log_true, i)
        spread = torch.exp(2 * (true_log - log_sigma)) - 1
        apart = ((true - mean) * torch.exp(-log_sigma)).square()
        return log_sigma - true_log + 0.5 * (spread + apart)

    def _posterior_mean(self, i, x: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        signal, before = self._at(self._signal, i), self._at(self._before, i)
        beta = self._at(self._beta, i)
        kept = (1 - beta).sqrt() * (1 - before) * x
        return (before.sqrt() * beta * clean + kept) / (1 - signal)

    @staticmethod
    def _at(values: torch.Tensor, i: int | torch.Tensor) -> torch.Tensor:
        """The value of one step, or [n, 1] of each row's."""
        return values[i] if isinstance(i, int) else values[i][:, None]


def head_loss(
    head: DiffusionHead, schedule: Schedule, conditions: torch.Tensor, clean: torch.Tensor,
    repeats: int,
) -> torch.Tensor:  # fmt: skip
    """What a head is trained with at latents ``clean`` [n, d] under ``conditions`` [n, c]: the
    error of what it predicts, plus a little of the chain's own bound, which is what teaches the
    variances (arXiv 2102.09672, equation 16), at ``repeats`` random steps per latent."""
    conditions, clean = conditions.repeat(repeats, 1), clean.repeat(repeats, 1)
    step = torch.randint(schedule.steps, (len(clean),))
    noise = torch.randn_like(clean)
    x = schedule.noised(step, clean, noise)
    said, fraction = head(x, schedule.times[step], conditions)
    bound = schedule.bound(step, x, clean, said.detach(), fraction)
    return F.mse_loss(said, schedule.aim(step, clean, noise)) + 0.001 * bound.mean()


def trace(
    head: DiffusionHead, schedule: Schedule, condition: torch.Tensor, noise: Noise,
    temperature: float | torch.Tensor = 1.0,
) -> Chain:  # fmt: skip
    """The chains of n latents under ``condition`` [n, c]. ``temperature`` (a number, or float32
    [n, 1]) scales all sigmas. ``noise`` may be of more steps than the schedule's."""
    x, noise = noise.start, noise.thinned(schedule.steps)
    colder = torch.as_tensor(temperature, device=x.device).log()
    path = torch.zeros(len(x), device=x.device)
    for i, say in enumerate(along(head, schedule.times.to(x.device), condition)):
        mean, log_sigma = schedule.step(i, x, *(part.float() for part in say(x)))
        log_sigma = log_sigma + colder
        if i < schedule.steps - 1:
            path = path + log_sigma.sum(-1)
        x = mean + log_sigma.exp() * noise.steps[:, i]
    return Chain(x, mean, log_sigma, path)


@torch.inference_mode()
def denoise(
    head: DiffusionHead, schedule: Schedule, condition: torch.Tensor, noise: Noise,
    temperature: float | torch.Tensor = 1.0,
) -> Chain:  # fmt: skip
    """:func:`trace`, for use and not for training."""
    return trace(head, schedule, condition, noise, temperature)


def gap(draft: Chain, target: Chain) -> torch.Tensor:
    """KL divergence, nats [n], of the draft's last Gaussian from the target's."""
    spread = 2 * (target.log_sigma - draft.log_sigma)
    apart = ((target.mean - draft.mean) * torch.exp(-draft.log_sigma)).square()
    return 0.5 * (spread.exp() + apart - 1 - spread).sum(-1)


def acceptance(draft: Chain, target: Chain) -> torch.Tensor:
    """Probability [n] with which each drafted sample is accepted under the exact rule: in the mean
    1 - TV of the two last Gaussians, differentiable through the samples."""
    ratio = target.log_density(draft.sample) - draft.log_density(draft.sample)
    return ratio.clamp(max=0).exp()


def along(head: DiffusionHead, times: torch.Tensor, condition: torch.Tensor):
    """Functions of ``x`` for each of ``times``; a head may have a faster way than to be called."""
    if hasattr(head, "along"):
        return head.along(times, condition)
    return (partial(head, times=time, condition=condition) for time in times[:, None])
