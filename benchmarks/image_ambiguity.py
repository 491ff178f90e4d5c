"""How interchangeable are a model's image codes? What relaxed acceptance can live on.

    python benchmarks/image_ambiguity.py --json benchmarks/results/images/ambiguity.json

Pictures are drawn by the plain model; at every code it is noted how much its distribution leaves
open (entropy), how probable the code was, and how much probability lies on its k nearest codes:
what LANTERN may borrow. The second half is the bound that matters: two independent draws of the
same distribution agree with probability ``sum p^2``, which is what a drafted code without a
distribution is accepted with, and with ``sum p (p + nearest)`` if neighbours count as hits.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import load_file

from vllm_specplus.cli.model import IMAGE_MODEL
from vllm_specplus.image.llamagen import LlamaGen, LlamaGenConfig
from vllm_specplus.samplers.relaxed_sampling import neighbours

NEAREST = (1, 10, 50)


@torch.inference_mode()
def measure(folder: Path, pictures: int, temperature: float, seed: int) -> dict[str, float]:
    config = LlamaGenConfig(**json.loads((folder / "config.json").read_text()))
    model = LlamaGen(config)
    tensors = load_file(folder / "model.safetensors")
    codebook = tensors.pop("codebook").float()
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(pictures) % config.num_classes
    codes = torch.empty(pictures, 0, dtype=torch.long)
    near = neighbours(codebook, max(NEAREST))
    seen: dict[str, list[torch.Tensor]] = {}
    for _ in range(config.grid_size**2):
        logits = model(codes, labels)[:, -1, : config.codebook_size] / temperature
        p = logits.softmax(-1)
        drawn = torch.multinomial(p, 1, generator=generator)
        columns = {
            "entropy": torch.special.entr(p).sum(-1),
            "largest": p.amax(-1),
            "hit": p.square().sum(-1),
        }
        for k in NEAREST:
            # [B, V]: the mass of each code's k nearest.
            lent = p[:, near[:, :k].flatten()].view(pictures, -1, k).sum(-1)
            columns[f"nearest_{k}"] = lent.gather(1, drawn)[:, 0]
            columns[f"hit_nearest_{k}"] = (p * (p + lent)).sum(-1)
        for name, values in columns.items():
            seen.setdefault(name, []).append(values)
        codes = torch.cat((codes, drawn), 1)
    table = {name: torch.cat(values) for name, values in seen.items()}
    out = {name: float(values.mean()) for name, values in table.items()}
    out["sure"] = float((table["largest"] > 0.9).float().mean())
    return out


def main(
    model: Annotated[Path, typer.Option(help="Folder of a LlamaGen.")] = IMAGE_MODEL,
    pictures: Annotated[int, typer.Option()] = 200,
    temperatures: Annotated[str, typer.Option(help="Separated by commas.")] = "0.7,1.0,1.3,1.6",
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    runs = {each: measure(model, pictures, float(each), 0) for each in temperatures.split(",")}
    names = list(next(iter(runs.values())))
    print("temperature", *names, sep="\t")
    for temperature, run in runs.items():
        print(temperature, *(f"{run[name]:.3f}" for name in names), sep="\t")
    if json_path:
        report = {
            "command": " ".join(sys.argv), "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__, "numpy": np.__version__, "pictures": pictures,
            "temperatures": runs,
        }  # fmt: skip
        json_path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
