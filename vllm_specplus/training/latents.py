"""The embedded models of continuous tokens: latents of MNIST's digits.

    python -m vllm_specplus.training.latents --data mnist10k.npz --out DIR

1. *VAE.* Pictures of 32 x 32 become 8 x 8 latents of 4 channels, of which the decoder reads a
   noisy version (``image/continuous/vae.py``).
2. *Causal* target and draft: latents in raster order behind a label.
3. *Masked* (MAR's) target and draft: latents in any order.
4. *Alignment.* The causal draft, which has learnt the data, then learns the target: with the same
   noise its chains are to end where the target's do.

The classifier that judges pictures is that of the other embedded image model, so that their
distances can be compared. All four models denoise by the same schedule, which draft and target
must share to be aligned. Every tenth label is dropped, for guidance, and pictures are also learnt
shifted by a pixel. A twentieth of the pictures is kept apart; ``log.json`` has losses, times and
settings. ``emoji_latents.py`` trains the same of emoji.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from torch.nn import functional as F

from vllm_specplus.image.continuous.causal import CausalLatents, CausalLatentsConfig
from vllm_specplus.image.continuous.chain import Chain, Noise, Schedule, acceptance, gap, trace
from vllm_specplus.image.continuous.masked import MaskedConfig, MaskedLatents
from vllm_specplus.image.continuous.vae import LatentVAE, VAEConfig, load_vae
from vllm_specplus.training import digits
from vllm_specplus.training.image_models import LABEL_DROP, Sample
from vllm_specplus.training.loop import train

#: Chains end at latents whose noise has 0.42 of the signal's deviation.
STEPS, END, PREDICTION = 6, 250, "velocity"
#: Of a picture of the masked model, where nothing else is said.
ITERATIONS = 16
#: Random steps of the schedule per latent and look at it.
REPEATS = 2
#: Of alignment: by KL divergence, then by acceptance.
ALIGN_STEPS = (1200, 700)


@dataclass(frozen=True)
class Kind:
    """What all models of some pictures' latents have in common."""

    size: int
    """Channels of a latent."""
    grid: int
    """Latents of a picture's side."""
    classes: list[str]
    image_channels: int
    classifier: Path
    """What judges the pictures, in a checkout."""
    batch: int
    """Pictures of a step of a model in training; of one that is aligned, half as many."""

    def schedule(self) -> Schedule:
        return Schedule(STEPS, end=END, prediction=PREDICTION)

    def anything(self, model: nn.Module) -> int:
        """The label that stands for all."""
        return len(self.classes) if isinstance(model, CausalLatents) else -1


DEMO_MODELS = Path(__file__).parents[2] / "demo_models"
DIGITS = Kind(
    size=4, grid=8, classes=digits.CLASSES, image_channels=1,
    classifier=DEMO_MODELS / "digits" / "classifier", batch=64,
)  # fmt: skip


def train_vae(kind: Kind, sample: Sample, steps: int, batch: int = 64) -> tuple[LatentVAE, list]:
    """``sample`` gives pictures, or crops of them."""
    signal = kind.schedule().signal_at_end
    config = VAEConfig(size=kind.size, signal=signal, image_channels=kind.image_channels)
    model = LatentVAE(config)

    def loss() -> torch.Tensor:
        seen = sample(batch)
        back = model.decode(model.noisy(model.encode(seen)))
        return (back - seen).abs().mean() + F.mse_loss(back, seen)

    return model, train("vae", model, loss, steps, 1e-3, 0.02)


@dataclass(frozen=True)
class Data:
    """Clean latents float32 [N, n, size] and labels int64 [N]: to learn, and kept apart."""

    clean: torch.Tensor
    labels: torch.Tensor
    held: tuple[torch.Tensor, torch.Tensor]


def train_latents(
    name: str, kind: Kind, model: nn.Module, vae: LatentVAE, data: Data, steps: int
) -> list:
    for key, parameter in model.named_parameters():
        # The head starts as the identity, which it has seen to itself.
        if parameter.dim() > 1 and not key.startswith(("head", "diffloss")):
            nn.init.normal_(parameter, std=0.02)
    schedule, anything = kind.schedule(), kind.anything(model)
    clean, held = data.clean, data.held

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(clean), (kind.batch,))
        label = torch.where(torch.rand(kind.batch) < LABEL_DROP, anything, data.labels[chosen])
        return model.loss(vae.noisy(clean[chosen]), clean[chosen], label, schedule, REPEATS)

    def held_out() -> dict[str, float]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss = model.loss(vae.noisy(held[0]), held[0], held[1], schedule)
            return {"held_out_loss": loss.item()}

    return train(name, model, loss, steps, 2e-3, 0.02, held_out)


def align(
    kind: Kind, draft: CausalLatents, target: CausalLatents, vae: LatentVAE, data: Data,
    steps: tuple[int, int],
) -> dict[str, list]:  # fmt: skip
    """Through all steps of the draft's chains, from the target's conditions on the data; ``steps``
    of the optimiser for either loss."""
    schedule, batch, clean = target.config.schedule(), kind.batch // 2, data.clean

    def chains(clean: torch.Tensor, label: torch.Tensor) -> tuple[Chain, Chain]:
        before = vae.noisy(clean)[:, :-1]
        rows = clean.shape[0] * clean.shape[1]
        noise = Noise(
            torch.randn(rows, kind.size), torch.randn(rows, schedule.steps, kind.size),
            torch.empty(rows),
        )  # fmt: skip
        with torch.no_grad():
            target_conditions = target.conditions(before, label).flatten(0, 1)
            goal = trace(target.head, schedule, target_conditions, noise)
        draft_conditions = draft.conditions(before, label).flatten(0, 1)
        return trace(draft.head, schedule, draft_conditions, noise), goal

    def random() -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(clean), (batch,))
        dropped = torch.rand(batch) < LABEL_DROP
        return clean[chosen], torch.where(dropped, kind.anything(target), data.labels[chosen])

    def held_out() -> dict[str, float]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            some = 2 * kind.batch
            pair = chains(data.held[0][:some], data.held[1][:some])
            return {
                "held_out_gap": gap(*pair).mean().item(),
                "held_out_acceptance": acceptance(*pair).mean().item(),
            }

    # Where the two are far apart acceptance is 0 and says nothing: first nearer, then hit.
    losses = {
        "gap": lambda: gap(*chains(*random())).mean(),
        "rejected": lambda: 1 - acceptance(*chains(*random())).mean(),
    }
    return {
        name: train(f"draft, {name}", draft, losses[name], count, 1e-3, 0.0, held_out)
        for name, count in zip(losses, steps, strict=True)
    }


def causal(
    hidden: int, layers: int, head_width: int, head_depth: int, kind: Kind = DIGITS
) -> CausalLatents:
    config = CausalLatentsConfig(
        size=kind.size, head_width=head_width, head_depth=head_depth, steps=STEPS, end=END,
        prediction=PREDICTION, num_classes=len(kind.classes), grid_size=kind.grid,
        hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers, num_attention_heads=hidden // 32,
        id2label=dict(enumerate(kind.classes)),
        label2id={name: i for i, name in enumerate(kind.classes)},
    )  # fmt: skip
    return CausalLatents(config)


def masked(
    width: int, layers: int, head_width: int, head_depth: int, kind: Kind = DIGITS
) -> MaskedLatents:
    config = MaskedConfig(
        length=kind.grid**2, size=kind.size, num_classes=len(kind.classes), encoder_width=width,
        encoder_depth=layers, encoder_heads=width // 32, decoder_width=width,
        decoder_depth=layers, decoder_heads=width // 32, buffer_size=4,
        head_width=head_width, head_depth=head_depth, steps=STEPS, end=END, prediction=PREDICTION,
        iterations=ITERATIONS,
    )  # fmt: skip
    return MaskedLatents(config)


@torch.no_grad()
def encode(vae: LatentVAE, pictures: torch.Tensor) -> torch.Tensor:
    """Clean latents float32 [N, n, size]."""
    return torch.cat([vae.encode(part) for part in pictures.split(256)])


@torch.no_grad()
def decoding_error(vae: LatentVAE, clean: torch.Tensor, pictures: torch.Tensor) -> float:
    """Mean absolute error of pictures decoded of their latents, of values in [-1, 1]."""
    parts = zip(clean.split(256), pictures.split(256), strict=True)
    errors = [(vae.decode(vae.noisy(part)) - seen).abs().mean((1, 2, 3)) for part, seen in parts]
    return torch.cat(errors).mean().item()


@dataclass(frozen=True)
class Training:
    """How long each part learns, in steps of the optimiser."""

    vae: int
    models: dict[str, tuple[Callable[[], nn.Module], int]]
    """Where each model is kept: what makes it, and its steps."""
    align: tuple[int, int] = ALIGN_STEPS

    def scaled(self, by: float) -> Training:
        """All but the VAE ``by`` times as long."""

        def scaled(steps: int) -> int:
            return max(int(steps * by), 1)

        models = {name: (make, scaled(steps)) for name, (make, steps) in self.models.items()}
        nearer, hit = self.align
        return Training(self.vae, models, (scaled(nearer), scaled(hit)))


@dataclass(frozen=True)
class Shown:
    """Pictures float32 [N, channels, height, width] in [-1, 1]."""

    crops: Sample
    """Of pictures to learn from, or parts of them, for the VAE."""
    variants: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    """All pictures to learn from, and their labels int64 [N]."""
    held: tuple[torch.Tensor, torch.Tensor]


def train_folder(
    out: Path, kind: Kind, shown: Shown, training: Training, settings: dict,
    only: str | None = None, only_align: bool = False,
) -> None:  # fmt: skip
    """All models of a folder, or ``only`` one, or only the draft's alignment, for the VAE that is
    there."""
    logs = {}
    if only is None and not only_align:
        shutil.copytree(kind.classifier, out / "classifier", dirs_exist_ok=True)
        vae, logs["vae"] = train_vae(kind, shown.crops, training.vae)
        vae.save(out)
    elif only is not None and only not in training.models:
        raise typer.BadParameter(f"--only {only}: the models are {', '.join(training.models)}")
    else:
        logs = json.loads((out / "log.json").read_text())
    vae = load_vae(out)  # as others will see it
    held_pictures, held_labels = shown.held
    held = encode(vae, held_pictures), held_labels
    error = decoding_error(vae, held[0], held_pictures)
    print("vae", {"held_out_error": error}, flush=True)
    pictures, labels = shown.variants()
    data = Data(encode(vae, pictures), labels, held)
    del pictures
    for name, (make, steps) in training.models.items():
        if only in (None, name) and not only_align:
            model = make()
            logs[name] = train_latents(name, kind, model, vae, data, steps)
            model.save(out / name)
    if only in (None, "draft"):
        draft, target = CausalLatents.load(out / "draft"), CausalLatents.load(out)
        logs["draft, aligned"] = align(kind, draft, target, vae, data, training.align)
        draft.save(out / "draft")
    (out / "log.json").write_text(
        json.dumps(logs | {"settings": settings, "held_out_error": error}, indent=1) + "\n"
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    ".": (lambda: causal(192, 4, 192, 3), 964),
    "draft": (lambda: causal(96, 1, 128, 1), 1484),
    "masked": (lambda: masked(128, 3, 160, 3), 964),
    "masked/draft": (lambda: masked(96, 1, 128, 1), 1484),
}


def main(
    data: Annotated[Path, typer.Option(help="mnist10k.npz")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vae_epochs: Annotated[int, typer.Option()] = 3,
    scale: Annotated[float, typer.Option(help="Of all other models' steps.")] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    only: Annotated[
        str | None, typer.Option(help="Train this one of the models alone, for the VAE in --out.")
    ] = None,
    only_align: Annotated[
        bool, typer.Option("--only-align", help="Align the draft in --out with its target alone.")
    ] = False,
) -> None:
    torch.manual_seed(seed)
    pictures, labels = digits.read(data)
    apart = int(len(pictures) * digits.HELD_OUT)
    order = torch.randperm(len(pictures))
    pictures, labels = pictures[order], labels[order]
    seen = pictures[apart:]

    def variants() -> tuple[torch.Tensor, torch.Tensor]:
        moved = torch.cat([seen.roll(shift, (2, 3)) for shift in digits.SHIFTS])
        return moved, labels[apart:].repeat(len(digits.SHIFTS))

    shown = Shown(
        crops=lambda count: seen[torch.randint(len(seen), (count,))], variants=variants,
        held=(pictures[:apart], labels[:apart]),
    )  # fmt: skip
    training = Training(vae_epochs * (len(seen) // 64), MODELS).scaled(scale)
    settings = {"vae_epochs": vae_epochs, "scale": scale, "seed": seed}
    train_folder(out, DIGITS, shown, training, settings, only, only_align)


if __name__ == "__main__":
    typer.run(main)
