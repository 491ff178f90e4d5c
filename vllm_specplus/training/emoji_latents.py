"""The embedded models of continuous tokens, of emoji: the twin of ``emoji.py``'s.

    python -m vllm_specplus.training.emoji_latents --out demo_models/emoji_latents

Under an hour on two cores; ``--data emoji64.npz`` saves fetching it. Pictures of 64 x 64 become
16 x 16 latents of 8 channels; what is trained, and how, is ``latents.py``'s. Targets have about 4.5
times the parameters of their drafts, as MAR-H has of MAR-B (943 and 208 million). The classifier is
that of ``demo_models/emoji``, so that distances can be compared with those of codes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from vllm_specplus.training import emoji, emoji_data
from vllm_specplus.training.latents import (
    DEMO_MODELS,
    Kind,
    Shown,
    Training,
    causal,
    masked,
    train_folder,
)

ALIGN_STEPS = (600, 350)


def kind_of(classes: list[str], classifier: Path) -> Kind:
    """Of emoji of the classes. A picture has four times as many latents as one of digits, so that
    a quarter as many pictures are a step."""
    return Kind(
        size=8, grid=emoji.GRID, classes=classes, image_channels=3, classifier=classifier, batch=16
    )


def models(kind: Kind) -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """As ``latents.MODELS``."""
    return {
        ".": (lambda: causal(192, 4, 192, 3, kind), 850),
        "draft": (lambda: causal(128, 2, 128, 1, kind), 1000),
        "masked": (lambda: masked(128, 3, 216, 3, kind), 800),
        "masked/draft": (lambda: masked(96, 1, 128, 1, kind), 1000),
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    data: Annotated[
        Path | None, typer.Option(help="emoji64.npz; fetched by npm if not given.")
    ] = None,
    classifier: Annotated[Path, typer.Option(help="Folder of what judges pictures.")] = DEMO_MODELS
    / "emoji"
    / "classifier",
    vae_steps: Annotated[int, typer.Option()] = 850,
    scale: Annotated[float, typer.Option(help="Of all other models' steps.")] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    only: Annotated[
        str | None, typer.Option(help="Train this one of the models alone, for the VAE in --out.")
    ] = None,
    only_align: Annotated[
        bool, typer.Option("--only-align", help="Align the draft in --out with its target alone.")
    ] = False,
) -> None:
    """Train all of the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            data = Path(scratch) / "emoji64.npz"
            emoji_data.main(data)
        shown, held, classes = emoji.read(data)
    torch.manual_seed(seed)
    kind = kind_of(classes, classifier)
    training = Training(vae_steps, models(kind), ALIGN_STEPS).scaled(scale)
    pictures = Shown(shown.growing(vae_steps), shown.variants, (held.pixels, held.labels))
    settings = {"vae_steps": vae_steps, "scale": scale, "seed": seed}
    train_folder(out, kind, pictures, training, settings, only, only_align)


if __name__ == "__main__":
    typer.run(main)
