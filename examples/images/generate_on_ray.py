"""Pictures from a model of latents by many devices, placed by Ray, as PNG files.

    python examples/images/generate_on_ray.py --out pictures --count 200 --workers 2

makes them with the embedded masked model of digits, drafted by CSpD. On a cluster give its
``--address`` and ``--gpus-per-worker 1``; the model's folder has to be on every node.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from vllm_specplus.cli.model import LATENTS_MODEL
from vllm_specplus.image.continuous.generation import Cspd, Recipe
from vllm_specplus.image.continuous.ray_generation import make_pictures


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    count: Annotated[int, typer.Option(help="Pictures, of all classes in turn.")] = 100,
    model: Annotated[Path, typer.Option(help="Folder.")] = LATENTS_MODEL / "masked",
    classes: Annotated[int, typer.Option(help="Of the model.")] = 10,
    window: Annotated[int, typer.Option(help="Drafted per pass; 0: nothing.")] = 4,
    guidance: Annotated[float, typer.Option(help="1 is none.")] = 1.0,
    workers: Annotated[int, typer.Option(help="Ray actors.")] = 2,
    gpus_per_worker: Annotated[float, typer.Option()] = 0.0,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    recipe = Recipe(cspd=Cspd(window=window) if window else None, guidance_scale=guidance)
    labels = [i % classes for i in range(count)]
    start = time.perf_counter()
    made = make_pictures(
        model, recipe, labels, range(seed, seed + count), workers=workers,
        gpus_per_worker=gpus_per_worker, address=address,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    out.mkdir(parents=True, exist_ok=True)
    for i, (label, picture) in enumerate(zip(labels, made, strict=True)):
        Image.fromarray(picture.squeeze()).save(out / f"{i:05}-{label}.png")
    typer.echo(f"{count} pictures in {out}, {seconds:.1f} s with the start of {workers} workers")


if __name__ == "__main__":
    typer.run(main)
