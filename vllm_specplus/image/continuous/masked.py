"""MAR (arXiv 2406.11838): latents in random order, several per iteration, seen from both sides.

Parameters carry the names of the public checkpoints. An encoder reads the latents that are known
behind a buffer of class embeddings, a decoder puts mask tokens in the place of the others, and
what it says of a position conditions the diffusion head there.

Speculation drafts the latents of several iterations and verifies them at once. In which *context*
the target judges them decides what comes out:

* ``own``: every iteration's latents among those drafted before it, as the target itself would
  see them. The first iteration with a rejection is the last one kept. The output has the
  target's distribution. No pass of the target is saved; but they no longer wait for each other.
* ``shared``: all of them among the verified ones alone, in one pass, and all are kept; this is what
  the released code of CSpD does. Under the exact rule a latent then has the distribution that the
  target gives it in that one pass, whatever was drafted: the output is that of the target
  with so many times fewer iterations, which needs no draft.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from vllm_specplus.image import weights
from vllm_specplus.image.continuous.acceptance import Rule, log_ratio, residual, streams_of
from vllm_specplus.image.continuous.chain import (
    ORDER,
    Chain,
    Noise,
    Schedule,
    denoise,
    head_loss,
    random_stream,
)
from vllm_specplus.image.continuous.decoding import Counts, GuidedHead, Settings, noise_of
from vllm_specplus.image.continuous.head import MLPHead
from vllm_specplus.strict import StrictModel

EPS = 1e-6


class MaskedConfig(StrictModel):
    """The defaults are MAR-B's."""

    length: int = 256
    size: int = 16
    num_classes: int = 1000
    encoder_width: int = 768
    encoder_depth: int = 12
    encoder_heads: int = 12
    decoder_width: int = 768
    decoder_depth: int = 12
    decoder_heads: int = 12
    buffer_size: int = 64
    head_width: int = 1024
    head_depth: int = 6
    steps: int = 100
    end: int = 0
    prediction: Literal["noise", "velocity"] = "noise"
    iterations: Annotated[int, Field(ge=1)] = 64
    """Of a picture, if nothing else is said; in MAR's script 64. No more than it has latents."""

    def schedule(self) -> Schedule:
        return Schedule(self.steps, end=self.end, prediction=self.prediction)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.attn, self.mlp = Attention(width, heads), MLP(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DiffLoss(nn.Module):
    """Where the checkpoints keep the head."""

    def __init__(self, config: MaskedConfig):
        super().__init__()
        width = config.decoder_width
        self.net = MLPHead(config.size, width, config.head_width, config.head_depth)


class MaskedLatents(nn.Module):
    def __init__(self, config: MaskedConfig):
        super().__init__()
        self.config = config
        encoder, decoder = config.encoder_width, config.decoder_width
        positions = config.buffer_size + config.length
        self.class_emb = nn.Embedding(config.num_classes, encoder)
        self.fake_latent = nn.Parameter(torch.zeros(1, encoder))
        """The embedding of "any class", for guidance."""
        self.z_proj = nn.Linear(config.size, encoder)
        self.z_proj_ln = nn.LayerNorm(encoder, eps=EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, encoder))
        self.encoder_blocks = nn.ModuleList(
            Block(encoder, config.encoder_heads) for _ in range(config.encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(encoder, eps=EPS)
        self.decoder_embed = nn.Linear(encoder, decoder)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, decoder))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder, config.decoder_heads) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder, eps=EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, config.length, decoder))
        self.diffloss = DiffLoss(config)

    @property
    def head(self) -> MLPHead:
        return self.diffloss.net

    def conditions(
        self, latents: torch.Tensor, known: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Of every position, [B, length, decoder]; ``latents`` float32 [B, length, size] count
        where ``known`` bool [B, length], as many in every picture. ``labels`` int64 [B], -1: any.
        """
        batch, buffer = len(latents), self.config.buffer_size
        label = self.class_emb(labels.clamp(min=0))
        label = torch.where(labels[:, None] < 0, self.fake_latent, label)
        x = torch.cat((label[:, None].expand(-1, buffer, -1), self.z_proj(latents)), 1)
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned)
        seen = F.pad(known, (buffer, 0), value=True)
        x = x[seen].view(batch, -1, x.shape[-1])
        for block in self.encoder_blocks:
            x = block(x)
        x = self.decoder_embed(self.encoder_norm(x))
        whole = self.mask_token.expand(batch, seen.shape[1], -1).clone()
        whole[seen] = x.flatten(0, 1)
        x = whole + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, buffer:] + self.diffusion_pos_embed_learned

    def loss(
        self, latents: torch.Tensor, clean: torch.Tensor, labels: torch.Tensor,
        schedule: Schedule, repeats: int = 4,
    ) -> torch.Tensor:  # fmt: skip
        """:func:`~vllm_specplus.image.continuous.chain.head_loss` of those ``clean`` latents
        that a random mask hides, 70 % to all (MAR, section 4.2), among ``latents``, as noisy as
        the schedule's end leaves them."""
        share = float(nn.init.trunc_normal_(torch.empty(1), 1.0, 0.25, 0.7, 1.0))
        hidden = max(1, math.ceil(latents.shape[1] * share))
        order = torch.rand(latents.shape[:2]).argsort(1)
        known = order >= hidden
        conditions = self.conditions(latents, known, labels)
        return head_loss(self.head, schedule, conditions[~known], clean[~known], repeats)

    @classmethod
    def load(cls, folder: str | Path) -> MaskedLatents:
        """Of a folder that :meth:`save` wrote, in float32."""
        folder = Path(folder)
        config = MaskedConfig.model_validate_json((folder / "config.json").read_text())
        return weights.load(cls(config), folder / "model.safetensors")

    def save(self, folder: Path) -> None:
        """In half precision."""
        weights.save(self, folder / "model.safetensors")
        (folder / "config.json").write_text(self.config.model_dump_json(indent=2) + "\n")


def known_latents(length: int, iterations: int) -> list[int]:
    """How many latents are known after 0 .. ``iterations`` iterations: by a cosine, at least
    one more each time (MAR, section 3.4)."""
    if not 1 <= iterations <= length:
        raise ValueError(
            f"iterations={iterations}: a picture of {length} latents has 1 to {length}"
        )
    masked = [length]
    for i in range(1, iterations):
        wanted = math.floor(length * math.cos(math.pi / 2 * i / iterations))
        masked.append(max(1, min(masked[-1] - 1, wanted)))
    return [length - left for left in masked] + [length]


def orders(seeds: list[int], length: int) -> torch.Tensor:
    """int64 [B, length]: positions in the order in which they become known, by the seed alone."""
    orders = [random_stream(seed, ORDER).permutation(length) for seed in seeds]
    return torch.from_numpy(np.stack(orders))


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance (MAR, section 4.4), as :class:`~.decoding.Guided` does it."""

    scale: float
    schedule: Literal["linear", "constant"] = "linear"
    """``linear``, MAR's: from 1 up to the scale, with the share of latents that are known after
    the iteration."""

    def at(self, share: float) -> float:
        return 1 + (self.scale - 1) * (share if self.schedule == "linear" else 1.0)


@dataclass(frozen=True, slots=True)
class MaskedSpeculation:
    window: int
    """Iterations drafted per verification, at most."""
    contexts: Literal["own", "shared"] = "own"
    rule: Rule = "exact"
    prefill: int = 0
    """First iterations that are not drafted."""
    steps: int | None = None
    """Of the draft's chains; None: the target's."""

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window={self.window}: at least 1 iteration is drafted")


class Run:
    """One batch of pictures, iteration by iteration."""

    def __init__(
        self, labels, seeds: list[int], settings: Settings, iterations: int,
        guidance: Guidance | None,
    ):  # fmt: skip
        self.labels, self.seeds, self.settings = labels, seeds, settings
        self.guidance = guidance
        self.order = orders(seeds, settings.length).to(labels.device)
        self.rank = self.order.argsort(1)
        self.counts = known_latents(settings.length, iterations)
        self.noise = noise_of(seeds, settings, labels.device)

    def positions(self, iteration: int) -> torch.Tensor:
        """int64 [B, n] that become known in it."""
        return self.order[:, self.counts[iteration] : self.counts[iteration + 1]]

    def draw(
        self, model: MaskedLatents, latents: torch.Tensor, pictures: torch.Tensor, known: int,
        positions: torch.Tensor, steps: int | None = None,
    ) -> Chain:  # fmt: skip
        """Chains, flat [len(pictures) * n], at ``positions`` [len(pictures), n] of ``pictures``
        int64, whose first ``known`` latents in order are seen; of ``steps`` steps, or all."""
        settings = self.settings.drafting(steps)
        seen, labels = self.rank[pictures] < known, self.labels[pictures]
        latents, head = latents[pictures], model.head
        if self.guidance is None:
            conditions = model.conditions(latents, seen, labels)
        else:
            twice = torch.cat((labels, torch.full_like(labels, -1)))
            both = model.conditions(latents.repeat(2, 1, 1), seen.repeat(2, 1), twice).chunk(2)
            share = (known + positions.shape[1]) / self.settings.length
            scale = torch.full_like(both[0][..., :1], self.guidance.at(share))
            conditions, head = torch.cat((*both, scale), -1), GuidedHead(head)
        rows = torch.arange(len(pictures), device=pictures.device)[:, None]
        noise = self.noise[pictures[:, None], positions]
        flat = Noise(*(getattr(noise, name).flatten(0, 1) for name in Noise.__slots__))
        own = conditions[rows, positions].flatten(0, 1)
        return denoise(head, settings.schedule, own, flat, settings.temperature)


@torch.inference_mode()
def decode_masked(
    model: MaskedLatents, labels: torch.Tensor, seeds: list[int], settings: Settings,
    iterations: int, guidance: Guidance | None = None,
) -> torch.Tensor:  # fmt: skip
    """Latents float32 [B, length, size] of the classes ``labels`` int64 [B], on their device."""
    run = Run(labels, seeds, settings, iterations, guidance)
    everyone = torch.arange(len(labels), device=labels.device)
    latents = torch.zeros_like(run.noise.start)
    for i in range(iterations):
        positions = run.positions(i)
        chain = run.draw(model, latents, everyone, run.counts[i], positions)
        latents[everyone[:, None], positions] = chain.sample.unflatten(0, positions.shape)
    return latents


@torch.inference_mode()
def decode_masked_speculative(
    target: MaskedLatents, draft: MaskedLatents, labels: torch.Tensor, seeds: list[int],
    settings: Settings, iterations: int, speculation: MaskedSpeculation,
    guidance: Guidance | None = None,
) -> tuple[torch.Tensor, Counts]:  # fmt: skip
    """Latents as of :func:`decode_masked`, and what it took; see the module's docstring.
    Pictures wait for each other in ``shared``, and go at their own pace in ``own``."""
    run = Run(labels, seeds, settings, iterations, guidance)
    latents = torch.zeros_like(run.noise.start)
    done, counts = torch.zeros_like(labels), Counts.of(labels, settings.length)
    while (done < iterations).any():
        # Pictures at the same iteration see as many latents: one pass for all of them.
        start = int(done.min())
        pictures = (done == start).nonzero()[:, 0]
        window = 0 if start < speculation.prefill else speculation.window
        drafted = range(start, min(start + window, iterations))
        q = {}
        for i in drafted:
            positions = run.positions(i)[pictures]
            q[i] = run.draw(draft, latents, pictures, run.counts[i], positions, speculation.steps)
            latents[pictures[:, None], positions] = q[i].sample.unflatten(0, positions.shape)
        counts.drafted[pictures] += sum(run.positions(i).shape[1] for i in drafted)
        if speculation.contexts == "shared" and drafted:
            positions = torch.cat([run.positions(i)[pictures] for i in drafted], 1)
            joined = _join([q[i] for i in drafted], len(pictures))
            p = run.draw(target, latents, pictures, run.counts[start], positions)
            _judge(run, latents, pictures, positions, joined, p, speculation.rule, counts)
            counts.target_passes[pictures] += 1
            done[pictures] = drafted.stop
            continue
        going = pictures
        for i in drafted:
            if not len(going):
                break
            here = torch.isin(pictures, going)
            positions = run.positions(i)[going]
            p = run.draw(target, latents, going, run.counts[i], positions)
            own = q[i][here.repeat_interleave(positions.shape[1])]
            counts.target_passes[going] += 1
            whole = _judge(run, latents, going, positions, own, p, speculation.rule, counts)
            done[going] = i + 1
            going = going[whole]
        # The iteration behind the drafts comes with the same verification, from the target.
        if drafted.stop < iterations and len(going):
            positions = run.positions(drafted.stop)[going]
            p = run.draw(target, latents, going, run.counts[drafted.stop], positions)
            latents[going[:, None], positions] = p.sample.unflatten(0, positions.shape)
            counts.target_passes[going] += 1
            done[going] = drafted.stop + 1
    return latents, counts


def _judge(run: Run, latents, pictures, positions, q: Chain, p: Chain, rule: Rule, counts: Counts):
    """Keep or replace every drafted latent; bool [len(pictures)]: all of a picture's kept."""
    uniforms = run.noise.uniforms[pictures[:, None], positions].flatten()
    taken = uniforms.log() < log_ratio(q, p, rule)
    picture = pictures[:, None].expand_as(positions).flatten()
    position = positions.flatten()
    wrong = (~taken).nonzero()[:, 0]
    counts.add_places(run.rank[picture, position], taken)
    counts.accepted += torch.bincount(picture[taken], minlength=len(latents))
    counts.rejected += torch.bincount(picture[wrong], minlength=len(latents))
    if len(wrong):
        seeds = [run.seeds[b] for b in picture[wrong].tolist()]
        streams = streams_of(seeds, position[wrong].tolist())
        instead = residual(q[wrong], p[wrong], streams, rule)
        latents[picture[wrong], position[wrong]] = instead.sample
        counts.proposals.index_add_(0, picture[wrong], instead.proposals)
        counts.given_up.index_add_(0, picture[wrong], instead.given_up.long())
    return taken.view(positions.shape).all(1)


def _join(chains: list[Chain], pictures: int) -> Chain:
    """Of several iterations, picture by picture."""

    def joined(name: str) -> torch.Tensor:
        parts = [getattr(chain, name) for chain in chains]
        return torch.cat([part.unflatten(0, (pictures, -1)) for part in parts], 1).flatten(0, 1)

    return Chain(*(joined(name) for name in Chain.__slots__))
