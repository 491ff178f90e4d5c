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
settings.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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
from vllm_specplus.training.digits import HELD_OUT, LABEL_DROP, SHIFTS, read
from vllm_specplus.training.loop import train

#: Chains end at latents whose noise has 0.42 of the signal's deviation.
STEPS, END, PREDICTION = 6, 250, "velocity"
SIZE, GRID = 4, 8
#: Of a picture of the masked model, where nothing else is said.
ITERATIONS = 16
#: In a checkout.
CLASSIFIER = Path(__file__).parents[2] / "demo_models" / "digits" / "classifier"
#: Random steps of the schedule per latent and look at it.
REPEATS = 2
#: Of alignment: by KL divergence, then by acceptance.
ALIGN_STEPS = (1200, 700)


def train_vae(pictures: torch.Tensor, epochs: int, batch: int = 64) -> tuple[LatentVAE, list]:
    signal = Schedule(STEPS, end=END, prediction=PREDICTION).signal_at_end
    model = LatentVAE(VAEConfig(size=SIZE, signal=signal))

    def loss() -> torch.Tensor:
        seen = pictures[torch.randint(len(pictures), (batch,))]
        back = model.decode(model.noisy(model.encode(seen)))
        return (back - seen).abs().mean() + F.mse_loss(back, seen)

    return model, train("vae", model, loss, epochs * (len(pictures) // batch), 1e-3, 0.02)


def train_latents(
    name: str, model: nn.Module, vae: LatentVAE, clean: torch.Tensor, labels: torch.Tensor,
    held: tuple[torch.Tensor, torch.Tensor], epochs: float, anything: int, batch: int = 64,
) -> list:  # fmt: skip
    """``clean`` float32 [N, n, size]; ``anything`` is the label that stands for all."""
    for key, parameter in model.named_parameters():
        # The head starts as the identity, which it has seen to itself.
        if parameter.dim() > 1 and not key.startswith(("head", "diffloss")):
            nn.init.normal_(parameter, std=0.02)
    schedule = Schedule(STEPS, end=END, prediction=PREDICTION)

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(clean), (batch,))
        label = torch.where(torch.rand(batch) < LABEL_DROP, anything, labels[chosen])
        return model.loss(vae.noisy(clean[chosen]), clean[chosen], label, schedule, REPEATS)

    def held_out() -> dict[str, float]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss = model.loss(vae.noisy(held[0]), held[0], held[1], schedule)
            return {"held_out_loss": loss.item()}

    steps = int(epochs * len(clean) / batch)
    return train(name, model, loss, steps, 2e-3, 0.02, held_out)


def align(
    draft: CausalLatents, target: CausalLatents, vae: LatentVAE, clean: torch.Tensor,
    labels: torch.Tensor, held: tuple[torch.Tensor, torch.Tensor], steps: tuple[int, int],
    batch: int = 32,
) -> dict[str, list]:  # fmt: skip
    """Through all steps of the draft's chains, from the target's conditions on the data; ``steps``
    of the optimiser for either loss."""
    schedule = target.config.schedule()

    def chains(clean: torch.Tensor, label: torch.Tensor) -> tuple[Chain, Chain]:
        before = vae.noisy(clean)[:, :-1]
        rows = clean.shape[0] * clean.shape[1]
        noise = Noise(
            torch.randn(rows, SIZE), torch.randn(rows, schedule.steps, SIZE), torch.empty(rows)
        )
        with torch.no_grad():
            target_conditions = target.conditions(before, label).flatten(0, 1)
            goal = trace(target.head, schedule, target_conditions, noise)
        draft_conditions = draft.conditions(before, label).flatten(0, 1)
        return trace(draft.head, schedule, draft_conditions, noise), goal

    def random() -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(clean), (batch,))
        return clean[chosen], torch.where(torch.rand(batch) < LABEL_DROP, 10, labels[chosen])

    def held_out() -> dict[str, float]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pair = chains(held[0][:128], held[1][:128])
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


def causal(hidden: int, layers: int, head_width: int, head_depth: int) -> CausalLatents:
    config = CausalLatentsConfig(
        size=SIZE, head_width=head_width, head_depth=head_depth, steps=STEPS, end=END,
        prediction=PREDICTION, num_classes=10, grid_size=GRID, hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, id2label={i: str(i) for i in range(10)},
        label2id={str(i): i for i in range(10)},
    )  # fmt: skip
    return CausalLatents(config)


def masked(width: int, layers: int, head_width: int, head_depth: int) -> MaskedLatents:
    config = MaskedConfig(
        length=GRID * GRID, size=SIZE, num_classes=10, encoder_width=width,
        encoder_depth=layers, encoder_heads=width // 32, decoder_width=width,
        decoder_depth=layers, decoder_heads=width // 32, buffer_size=4,
        head_width=head_width, head_depth=head_depth, steps=STEPS, end=END, prediction=PREDICTION,
        iterations=ITERATIONS,
    )  # fmt: skip
    return MaskedLatents(config)


#: Where each model is kept, and what it is: (make, passes over the shifted pictures).
MODELS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    ".": (lambda: causal(192, 4, 192, 3), 1.3),
    "draft": (lambda: causal(96, 1, 128, 1), 2.0),
    "masked": (lambda: masked(128, 3, 160, 3), 1.3),
    "masked/draft": (lambda: masked(96, 1, 128, 1), 2.0),
}


def main(
    data: Annotated[Path, typer.Option(help="mnist10k.npz")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vae_epochs: Annotated[int, typer.Option()] = 3,
    scale: Annotated[float, typer.Option(help="Of all other models' passes.")] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    only: Annotated[
        str | None, typer.Option(help="Train this one of the models alone, for the VAE in --out.")
    ] = None,
    only_align: Annotated[
        bool, typer.Option("--only-align", help="Align the draft in --out with its target alone.")
    ] = False,
) -> None:
    torch.manual_seed(seed)
    pictures, labels = read(data)
    apart = int(len(pictures) * HELD_OUT)
    order = torch.randperm(len(pictures))
    pictures, labels = pictures[order], labels[order]
    held, shown = pictures[:apart], pictures[apart:]
    logs = {}
    if only is None and not only_align:
        shutil.copytree(CLASSIFIER, out / "classifier", dirs_exist_ok=True)
        vae, logs["vae"] = train_vae(shown, vae_epochs)
        vae.save(out)
    elif only is not None and only not in MODELS:
        raise typer.BadParameter(f"--only {only}: the models are {', '.join(MODELS)}")
    else:
        logs = json.loads((out / "log.json").read_text())
    vae = load_vae(out)  # as others will see it
    with torch.no_grad():
        clean = torch.cat([
            vae.encode(part) for shift in SHIFTS for part in shown.roll(shift, (2, 3)).split(256)
        ])  # fmt: skip
        held_clean = vae.encode(held)
        error = (vae.decode(vae.noisy(held_clean)) - held).abs().mean().item()
    print("vae", {"held_out_error": error}, flush=True)
    labels, held_labels = labels[apart:].repeat(len(SHIFTS)), labels[:apart]
    for name, (make, epochs) in MODELS.items():
        if only not in (None, name) or only_align:
            continue
        model = make()
        anything = 10 if isinstance(model, CausalLatents) else -1
        logs[name] = train_latents(
            name, model, vae, clean, labels, (held_clean, held_labels), epochs * scale, anything
        )
        model.save(out / name)
    if only in (None, "draft"):
        draft, target = CausalLatents.load(out / "draft"), CausalLatents.load(out)
        held_pair = held_clean, held_labels
        steps = tuple(max(int(each * scale), 1) for each in ALIGN_STEPS)
        logs["draft, aligned"] = align(draft, target, vae, clean, labels, held_pair, steps)
        draft.save(out / "draft")
    settings = {"vae_epochs": vae_epochs, "scale": scale, "seed": seed}
    (out / "log.json").write_text(
        json.dumps(logs | {"settings": settings, "held_out_error": error}, indent=1) + "\n"
    )


if __name__ == "__main__":
    typer.run(main)
