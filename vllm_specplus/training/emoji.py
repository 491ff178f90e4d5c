"""The embedded image model of emoji: a VQ model, a class-conditional LlamaGen, a classifier.

    python -m vllm_specplus.training.emoji --data emoji64.npz --out demo_models/emoji

(``emoji_data.py`` makes the file; without ``--data`` it is made first.) Under an hour on two cores.

Colour pictures of 64 x 64 become 16 x 16 codes of a codebook of 1,024; a class is a subgroup of
Unicode's list of emoji. ``image_models.py`` has what is trained, and how. The VQ model sees crops
of 32 x 32 at first, which is what its convolutions need to know and a quarter of the work. All
models learn mirror images and small shifts as well. Every twentieth emoji is kept apart, in both
styles.
``log.json`` in the folder has the losses, times and settings; ``--scale`` is for trying it out.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch.nn import functional as F

from vllm_specplus.image.quality import ClassifierConfig, Gaussian, PictureClassifier, features
from vllm_specplus.image.vq import VQConfig, VQModel
from vllm_specplus.training import emoji_data
from vllm_specplus.training.image_models import (
    Sample,
    encode,
    judge_codes,
    llamagen_config,
    save_ar,
    train_ar,
    train_classifier,
    train_vq,
)

VQ = VQConfig(
    codebook_size=1024, codebook_dim=8, image_channels=3, channels=32, multipliers=(1, 1, 2),
    blocks=1, latent_channels=64,
)  # fmt: skip
SIDE, CROP, GRID = emoji_data.SIDE, 32, 16
SHIFTS = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))
HELD_OUT = 20
"""Of so many emoji one is kept apart."""
#: Steps of the optimiser, and passes of the LlamaGen over all variants of the pictures.
VQ_STEPS, CLASSIFIER_STEPS, EPOCHS = 1300, 2000, 1.2
GUIDANCE = 1.5


@dataclass(frozen=True)
class Pictures:
    """Some emoji; all tensors by picture."""

    pixels: torch.Tensor
    """float32 [N, 3, SIDE, SIDE] in [-1, 1]."""
    labels: torch.Tensor
    """int64 [N]"""
    mirrors: torch.Tensor
    """bool [N]: may the mirror image be learnt?"""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: torch.Tensor) -> Pictures:
        return Pictures(self.pixels[index], self.labels[index], self.mirrors[index])

    def sample(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random pictures float32 [count, 3, SIDE, SIDE], mirrored and shifted at random, and their
        labels int64 [count]."""
        some = self[torch.randint(len(self), (count,))]
        turned = some.mirrors & (torch.rand(count) < 0.5)
        pixels = torch.where(turned[:, None, None, None], some.pixels.flip(3), some.pixels)
        down, right = torch.randint(-2, 3, (2,)).tolist()
        return shifted(pixels, (down, right)), some.labels

    def crops(self, count: int) -> torch.Tensor:
        """float32 [count, 3, CROP, CROP]: a random part of each of some of :meth:`sample`."""
        pixels, _ = self.sample(count)
        top, left = torch.randint(SIDE - CROP + 1, (2, count, 1))
        rows, columns = top + torch.arange(CROP), left + torch.arange(CROP)
        picture = torch.arange(count)[:, None, None]
        cut = pixels.movedim(1, -1)[picture, rows[:, :, None], columns[:, None]]
        return cut.movedim(-1, 1)

    def variants(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All that the LlamaGen learns: pictures and mirror images, shifted by :data:`SHIFTS`, and
        their labels."""
        pixels = torch.cat((self.pixels, self.pixels[self.mirrors].flip(3)))
        labels = torch.cat((self.labels, self.labels[self.mirrors]))
        moved = torch.cat([shifted(pixels, shift) for shift in SHIFTS])
        return moved, labels.repeat(len(SHIFTS))

    def growing(self, steps: int) -> Sample:
        """For so many ``steps`` of a model that is convolutions all but for its middle:
        :meth:`crops`, and in the last fifth whole pictures, a quarter as many."""
        calls = itertools.count()

        def sample(count: int) -> torch.Tensor:
            if next(calls) < 0.8 * steps:
                return self.crops(count)
            return self.sample(max(count // 4, 1))[0]

        return sample


def shifted(pixels: torch.Tensor, by: tuple[int, int]) -> torch.Tensor:
    """``pixels`` [N, 3, height, width] moved down and right; what comes in is white."""
    down, right = by
    margin = max(abs(down), abs(right))
    if not margin:
        return pixels
    wide = F.pad(pixels, (margin,) * 4, value=1.0)
    top, left = margin - down, margin - right
    height, width = pixels.shape[2:]
    return wide[:, :, top : top + height, left : left + width]


def read(path: Path) -> tuple[Pictures, Pictures, list[str]]:
    """Pictures to learn from, those that are kept apart, and the names of the classes."""
    data = np.load(path, allow_pickle=False)
    pixels = torch.from_numpy(data["images"]).movedim(-1, 1).float() / 127.5 - 1
    every = Pictures(
        pixels, torch.from_numpy(data["labels"]).long(), torch.from_numpy(data["mirrors"])
    )
    # Both styles of an emoji are on one side.
    _, number = np.unique(data["codes"], return_inverse=True)
    order = np.random.default_rng(0).permutation(number.max() + 1)
    apart = torch.from_numpy(order[number] % HELD_OUT == 0)
    return every[~apart], every[apart], [str(name) for name in data["classes"]]


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    data: Annotated[
        Path | None, typer.Option(help="emoji64.npz; fetched by npm if not given.")
    ] = None,
    hidden: Annotated[int, typer.Option()] = 192,
    layers: Annotated[int, typer.Option()] = 5,
    scale: Annotated[float, typer.Option(help="Of all steps.")] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train all of the folder, and say how well."""
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            data = Path(scratch) / "emoji64.npz"
            emoji_data.main(data)
        shown, held, classes = read(data)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    steps = max(int(scale * VQ_STEPS), 1)
    vq, vq_log = train_vq(VQ, shown.growing(steps), steps, 12)
    vq.save(out, torch.float16)
    vq = VQModel.load(out)  # as others will see it
    pixels, labels = shown.variants()
    codes, held_codes = encode(vq, pixels), encode(vq, held.pixels)
    summary = judge_codes(vq, codes, held.pixels, held_codes)
    print("codes", summary, flush=True)
    config = ClassifierConfig(
        name="emoji", side=SIDE, image_channels=3, classes=len(classes),
        widths=(32, 64, 96, 128),
    )  # fmt: skip
    classifier, classifier_log = train_classifier(
        config, shown.sample, (held.pixels, held.labels), max(int(scale * CLASSIFIER_STEPS), 1)
    )
    classifier.save(out)
    # Pictures are made of all classes alike.
    weights = 1 / torch.bincount(labels).double()[labels].numpy()
    Gaussian.of(features(PictureClassifier.load(out), pixels), weights).save(out)
    model, log = train_ar(
        llamagen_config(VQ, GRID, classes, hidden, layers, GUIDANCE), codes, labels,
        (held_codes, held.labels), scale * EPOCHS,
    )  # fmt: skip
    save_ar(out, model, vq)
    settings = {"hidden": hidden, "layers": layers, "scale": scale, "seed": seed}
    counted = {"pictures": len(shown), "held_out": len(held), "classes": len(classes)}
    report = {
        "settings": settings, "data": counted, "codes": summary, "vq": vq_log, "llamagen": log,
        "classifier": classifier_log,
    }  # fmt: skip
    (out / "log.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
