"""The embedded image model: a VQ model and a class-conditional LlamaGen of MNIST's digits.

    python -m vllm_specplus.training.digits --data mnist10k.npz --out DIR

1. *VQ model.* Pictures of 32 x 32 become 8 x 8 codes of a codebook of 512. Codes that no
   picture uses are put where the encoder's outputs are, so that all are in use, and
   neighbours stand for nearly the same strokes: the ambiguity that relaxed acceptance
   lives on is the data's, not made up.
2. *LlamaGen.* Predicts the codes in raster order behind a label; every tenth label is
   dropped, for guidance. Pictures are also learnt shifted by a pixel.
3. *Classifier.* A small convolutional network on the same pictures, for the bench's Fréchet
   distance and class accuracy.

A twentieth of the pictures is kept apart, to tell overfitting. ``log.json`` in the folder has
the losses, times and settings.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn
from torch.nn import functional as F

from vllm_specplus.image import llamagen, weights
from vllm_specplus.image.llamagen import LlamaGen, LlamaGenConfig
from vllm_specplus.image.quality import DigitClassifier, Gaussian, features
from vllm_specplus.image.vq import VQConfig, VQModel
from vllm_specplus.training.loop import lr_schedule, train

VQ = VQConfig(
    codebook_size=512, codebook_dim=8, image_channels=1, channels=32, multipliers=(1, 1, 2),
    blocks=1, latent_channels=64,
)  # fmt: skip
SHIFTS = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))
HELD_OUT, LABEL_DROP, DROPOUT = 0.05, 0.1, 0.1
#: Weight of the commitment loss, as in VQ-VAE (arXiv 1711.00937).
COMMITMENT = 0.25
#: Steps between looks at which codes are in use.
REVIVE = 50


def read(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures float32 [N, 1, 32, 32] in [-1, 1] and labels int64 [N]."""
    data = np.load(path, allow_pickle=False)
    pictures = torch.from_numpy(data["images"]).float().reshape(-1, 1, 28, 28)
    pictures = F.pad(pictures / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    return pictures, torch.from_numpy(data["labels"]).long().reshape(-1)


def train_vq(pictures: torch.Tensor, epochs: int, batch: int = 64) -> tuple[VQModel, list]:
    model = VQModel(VQ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    steps = epochs * (len(pictures) // batch)
    schedule, log, used = lr_schedule(optimizer, steps), [], torch.zeros(VQ.codebook_size)
    with torch.no_grad():
        first = model.latents(pictures[torch.randperm(len(pictures))[:batch]]).flatten(0, -2)
        chosen = torch.randperm(len(first))[: VQ.codebook_size]
        model.quantize.embedding.weight.copy_(first[chosen])
    start, sums = time.perf_counter(), np.zeros(2)
    for step in range(steps):
        seen = pictures[torch.randint(len(pictures), (batch,))]
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
        used += torch.bincount(codes.flatten(), minlength=VQ.codebook_size)
        sums += error.item(), 1
        if step % REVIVE == REVIVE - 1 and step < 0.8 * steps:
            idle = (used < 2).nonzero()[:, 0]
            there = z.detach().flatten(0, -2)
            with torch.no_grad():
                chosen = torch.randint(len(there), (len(idle),))
                model.quantize.embedding.weight[idle] = there[chosen]
            used.zero_()
        if step % (steps // max(epochs, 1)) == 0 or step == steps - 1:
            seconds = time.perf_counter() - start
            log.append({"step": step, "error": sums[0] / sums[1], "seconds": round(seconds, 1)})
            print("vq", log[-1], flush=True)
            sums[:] = 0
    return model.eval(), log


@torch.no_grad()
def encode(model: VQModel, pictures: torch.Tensor) -> torch.Tensor:
    """int64 [N, codes]"""
    return torch.cat([model.encode(part).flatten(1) for part in pictures.split(256)])


def config_for(hidden: int, layers: int) -> LlamaGenConfig:
    return LlamaGenConfig(
        codebook_size=VQ.codebook_size, codebook_dim=VQ.codebook_dim, num_classes=10, grid_size=8,
        hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 32 * 32, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, guidance_scale=1.5,
        id2label={i: str(i) for i in range(10)}, label2id={str(i): i for i in range(10)},
    )  # fmt: skip


def train_ar(
    config: LlamaGenConfig, codes: torch.Tensor, labels: torch.Tensor, held: tuple, epochs: int,
    batch: int = 64,
) -> tuple[LlamaGen, list]:  # fmt: skip
    """Losses are nats per code."""
    model = LlamaGen(config, DROPOUT)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)

    def nats(codes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(codes[:, :-1], labels).flatten(0, 1), codes.flatten())

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(codes), (batch,))
        dropped = torch.rand(batch) < LABEL_DROP
        return nats(codes[chosen], torch.where(dropped, config.num_classes, labels[chosen]))

    def held_out() -> dict[str, float]:
        return {"held_out_loss": nats(*held).item()}

    steps = epochs * (len(codes) // batch)
    return model, train("llamagen", model, loss, steps, 2e-3, 0.05, held_out, reports=20)


def train_classifier(pictures, labels, held, epochs: int, batch: int = 64):
    model = DigitClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps = epochs * (len(pictures) // batch)
    schedule = lr_schedule(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (batch,))
        loss = F.cross_entropy(model(pictures[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(held[0]).argmax(-1) == held[1]).float().mean().item()
    print("classifier", {"held_out_accuracy": accuracy}, flush=True)
    return model, [{"steps": steps, "held_out_accuracy": accuracy}]


def main(
    data: Annotated[Path, typer.Option(help="mnist10k.npz")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vq_epochs: Annotated[int, typer.Option()] = 6,
    epochs: Annotated[int, typer.Option(help="Of the LlamaGen model, over shifted pictures.")] = 3,
    hidden: Annotated[int, typer.Option()] = 192,
    layers: Annotated[int, typer.Option()] = 4,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    torch.manual_seed(seed)
    pictures, labels = read(data)
    apart = int(len(pictures) * HELD_OUT)
    order = torch.randperm(len(pictures))
    pictures, labels = pictures[order], labels[order]
    held, shown = pictures[:apart], pictures[apart:]
    held_labels, train_labels = labels[:apart], labels[apart:]
    vq, vq_log = train_vq(shown, vq_epochs)
    out.mkdir(parents=True, exist_ok=True)
    vq.save(out, torch.float16)
    vq = VQModel.load(out)  # as others will see it
    codes = torch.cat([encode(vq, shown.roll(shift, (2, 3))) for shift in SHIFTS])
    held_codes = encode(vq, held)
    with torch.no_grad():
        error = (vq.decode(held_codes.view(-1, 8, 8)) - held).abs().mean().item()
    share = torch.bincount(codes.flatten(), minlength=VQ.codebook_size) / codes.numel()
    summary = {
        "held_out_error": error,
        "codes_in_use": int((share > 0).sum()),
        "code_entropy_nats": float(torch.special.entr(share).sum()),
    }
    print("codes", summary, flush=True)
    classifier, classifier_log = train_classifier(shown, train_labels, (held, held_labels), 6)
    weights.save(classifier, out / "classifier" / "model.safetensors")
    Gaussian.of(features(DigitClassifier.load(out), shown)).save(out)
    config = config_for(hidden, layers)
    model, log = train_ar(
        config, codes, train_labels.repeat(len(SHIFTS)), (held_codes, held_labels), epochs
    )
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    llamagen.save(out, tensors | {"codebook": vq.quantize.vectors().detach().half()}, config)
    settings = {
        "vq_epochs": vq_epochs, "epochs": epochs, "hidden": hidden, "layers": layers, "seed": seed,
    }  # fmt: skip
    (out / "log.json").write_text(
        json.dumps(
            {"settings": settings, "codes": summary, "vq": vq_log, "llamagen": log,
             "classifier": classifier_log}, indent=1,
        ) + "\n"
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
