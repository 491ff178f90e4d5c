"""The parts that the embedded image models are made of, whatever they are trained on.

1. *VQ model.* Pictures become codes. Codes that no picture uses are put where the encoder's
   outputs are, so that all are in use, and neighbours stand for nearly the same strokes: the
   ambiguity that relaxed acceptance lives on is the data's, not made up.
2. *LlamaGen.* Predicts the codes in raster order behind a label; every tenth label is dropped, for
   guidance.
3. *Classifier.* A small convolutional network on the same pictures, for the bench's Fréchet
   distance and class accuracy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vllm_specplus.image import llamagen
from vllm_specplus.image.llamagen import LlamaGen, LlamaGenConfig
from vllm_specplus.image.quality import ClassifierConfig, PictureClassifier
from vllm_specplus.image.vq import VQConfig, VQModel
from vllm_specplus.training.loop import lr_schedule, train

LABEL_DROP, DROPOUT = 0.1, 0.1
#: Weight of the commitment loss, as in VQ-VAE (arXiv 1711.00937).
COMMITMENT = 0.25
#: Steps between looks at which codes are in use.
REVIVE = 50

#: ``n`` -> that many pictures to learn from, float32 [n, channels, height, width] in [-1, 1].
Sample = Callable[[int], torch.Tensor]
#: ``n`` -> the same with their labels int64 [n].
LabelledSample = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


def train_vq(
    config: VQConfig, sample: Sample, steps: int, reports: int, batch: int = 64
) -> tuple[VQModel, list]:
    """Returns the model and about ``reports`` entries of what it missed pictures by."""
    model = VQModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule, log = lr_schedule(optimizer, steps), []
    used = torch.zeros(config.codebook_size)
    with torch.no_grad():
        first = model.latents(sample(batch)).flatten(0, -2)
        chosen = torch.randint(len(first), (config.codebook_size,))
        if len(first) >= config.codebook_size:
            chosen = torch.randperm(len(first))[: config.codebook_size]
        model.quantize.embedding.weight.copy_(first[chosen])
    start, sums = time.perf_counter(), np.zeros(2)
    for step in range(steps):
        seen = sample(batch)
        z = model.latents(seen)
        codes = (z.detach() @ model.quantize.vectors().T).argmax(-1)
        e = model.quantize.vectors()[codes]
        back = model.decode_latents(z + (e - z).detach())
        error = (back - seen).abs().mean() + F.mse_loss(back, seen)
        loss = error + F.mse_loss(e, z.detach()) + COMMITMENT * F.mse_loss(e.detach(), z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        used += torch.bincount(codes.flatten(), minlength=config.codebook_size)
        sums += error.item(), 1
        if step % REVIVE == REVIVE - 1 and step < 0.8 * steps:
            revive(model, used, z.detach().flatten(0, -2))
            used.zero_()
        if step % max(steps // reports, 1) == 0 or step == steps - 1:
            seconds = time.perf_counter() - start
            log.append({"step": step, "error": sums[0] / sums[1], "seconds": round(seconds, 1)})
            print("vq", log[-1], flush=True)
            sums[:] = 0
    return model.eval(), log


@torch.no_grad()
def revive(model: VQModel, used: torch.Tensor, there: torch.Tensor) -> None:
    """Put codes that were ``used`` [V] less than twice where some of the latents ``there``
    [n, dim] are."""
    idle = (used < 2).nonzero()[:, 0]
    chosen = torch.randint(len(there), (len(idle),))
    model.quantize.embedding.weight[idle] = there[chosen]


@torch.no_grad()
def encode(model: VQModel, pictures: torch.Tensor) -> torch.Tensor:
    """int64 [N, codes]"""
    return torch.cat([model.encode(part).flatten(1) for part in pictures.split(256)])


@torch.no_grad()
def judge_codes(
    model: VQModel, codes: torch.Tensor, held: torch.Tensor, held_codes: torch.Tensor
) -> dict[str, float]:
    """How ``codes`` int64 [N, n] use the codebook, and how far held-out pictures are from what is
    decoded of theirs (mean absolute error, of values in [-1, 1])."""
    side = round(held_codes.shape[1] ** 0.5)
    parts = zip(held_codes.view(-1, side, side).split(256), held.split(256), strict=True)
    errors = [(model.decode(part) - seen).abs().mean((1, 2, 3)) for part, seen in parts]
    share = torch.bincount(codes.flatten(), minlength=model.config.codebook_size) / codes.numel()
    return {
        "held_out_error": torch.cat(errors).mean().item(),
        "codes_in_use": int((share > 0).sum()),
        "code_entropy_nats": float(torch.special.entr(share).sum()),
    }


def llamagen_config(
    vq: VQConfig, grid_size: int, classes: list[str], hidden: int, layers: int,
    guidance_scale: float,
) -> LlamaGenConfig:  # fmt: skip
    """Heads of 32 channels; ``classes`` are what prompts say."""
    return LlamaGenConfig(
        codebook_size=vq.codebook_size, codebook_dim=vq.codebook_dim, num_classes=len(classes),
        grid_size=grid_size, hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers, num_attention_heads=hidden // 32, guidance_scale=guidance_scale,
        id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
    )  # fmt: skip


def shuffled(count: int, batch: int) -> Iterator[torch.Tensor]:
    """Batches of indices below ``count`` without end: each comes once in every pass."""
    while True:
        yield from torch.randperm(count).split(batch)


def train_ar(
    config: LlamaGenConfig, codes: torch.Tensor, labels: torch.Tensor,
    held: tuple[torch.Tensor, torch.Tensor], epochs: float, batch: int = 64, rate: float = 2e-3,
) -> tuple[LlamaGen, list]:  # fmt: skip
    """Learn ``codes`` int64 [N, n] of classes ``labels`` int64 [N]; losses are nats per code."""
    model = LlamaGen(config, DROPOUT)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    order = shuffled(len(codes), batch)

    def nats(codes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(codes[:, :-1], labels).flatten(0, 1), codes.flatten())

    def loss() -> torch.Tensor:
        chosen = next(order)
        dropped = torch.rand(len(chosen)) < LABEL_DROP
        return nats(codes[chosen], torch.where(dropped, config.num_classes, labels[chosen]))

    def held_out() -> dict[str, float]:
        parts = zip(*(part.split(64) for part in held), strict=True)
        sums = [nats(*part).item() * len(part[0]) for part in parts]
        return {"held_out_loss": sum(sums) / len(held[0])}

    steps = max(int(epochs * len(codes) / batch), 1)
    return model, train("llamagen", model, loss, steps, rate, 0.05, held_out, reports=20)


def save_ar(folder: Path, model: LlamaGen, vq: VQModel) -> None:
    """Write a folder that vLLM serves, in half precision."""
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    codebook = vq.quantize.vectors().detach().half()
    llamagen.save(folder, tensors | {"codebook": codebook}, model.config)


def train_classifier(
    config: ClassifierConfig, sample: LabelledSample, held: tuple[torch.Tensor, torch.Tensor],
    steps: int, batch: int = 64,
) -> tuple[PictureClassifier, list]:  # fmt: skip
    """``held``: pictures and labels of which the accuracy is told."""
    model = PictureClassifier(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = lr_schedule(optimizer, steps)
    for _ in range(steps):
        pictures, labels = sample(batch)
        loss = F.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        known = torch.cat([model(part).argmax(-1) for part in held[0].split(256)])
    accuracy = (known == held[1]).float().mean().item()
    print("classifier", {"held_out_accuracy": accuracy}, flush=True)
    return model, [{"steps": steps, "held_out_accuracy": accuracy}]
