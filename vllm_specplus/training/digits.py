"""The embedded image model of digits: a VQ model and a class-conditional LlamaGen of MNIST.

    python -m vllm_specplus.training.digits --data mnist10k.npz --out DIR

Pictures of 32 x 32 become 8 x 8 codes of a codebook of 512 (``image_models.py`` has how), and are
learnt shifted by a pixel as well. A twentieth of them is kept apart, to tell overfitting.
``log.json`` in the folder has the losses, times and settings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch.nn import functional as F

from vllm_specplus.image.quality import ClassifierConfig, Gaussian, PictureClassifier, features
from vllm_specplus.image.vq import VQConfig, VQModel
from vllm_specplus.training.image_models import (
    encode,
    judge_codes,
    llamagen_config,
    save_ar,
    train_ar,
    train_classifier,
    train_vq,
)

VQ = VQConfig(
    codebook_size=512, codebook_dim=8, image_channels=1, channels=32, multipliers=(1, 1, 2),
    blocks=1, latent_channels=64,
)  # fmt: skip
SHIFTS = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))
HELD_OUT = 0.05
BATCH = 64
CLASSES = [str(digit) for digit in range(10)]


def read(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures float32 [N, 1, 32, 32] in [-1, 1] and labels int64 [N]."""
    data = np.load(path, allow_pickle=False)
    pictures = torch.from_numpy(data["images"]).float().reshape(-1, 1, 28, 28)
    pictures = F.pad(pictures / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    return pictures, torch.from_numpy(data["labels"]).long().reshape(-1)


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

    def sample(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(shown), (count,))
        return shown[chosen], train_labels[chosen]

    passes = len(shown) // BATCH
    vq, vq_log = train_vq(VQ, lambda count: sample(count)[0], vq_epochs * passes, vq_epochs)
    out.mkdir(parents=True, exist_ok=True)
    vq.save(out, torch.float16)
    vq = VQModel.load(out)  # as others will see it
    codes = torch.cat([encode(vq, shown.roll(shift, (2, 3))) for shift in SHIFTS])
    held_codes = encode(vq, held)
    summary = judge_codes(vq, codes, held, held_codes)
    print("codes", summary, flush=True)
    classifier, classifier_log = train_classifier(
        ClassifierConfig(), sample, (held, held_labels), 6 * passes
    )
    classifier.save(out)
    Gaussian.of(features(PictureClassifier.load(out), shown)).save(out)
    config = llamagen_config(VQ, 8, CLASSES, hidden, layers, 1.5)
    model, log = train_ar(
        config, codes, train_labels.repeat(len(SHIFTS)), (held_codes, held_labels), epochs
    )
    save_ar(out, model, vq)
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
