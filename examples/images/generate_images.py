"""Pictures from an image model in vLLM as PNG files.

    python examples/images/generate_images.py --out pictures --labels 3,1,4,1,5

makes them with the embedded model of digits, drafted by Jacobi iteration.
``--spec '{"method": "jacobi", "acceptance": {"rule": "gsd"}}'`` takes fewer steps and is lossy;
``--guidance`` is classifier-free guidance, per request. With ``--latents`` the model is the one
whose tokens are continuous, drafted by CSpD; it has no guidance.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    labels: Annotated[str, typer.Option(help="Classes, separated by commas.")] = "0,1,2,3,4",
    model: Annotated[Path | None, typer.Option(help="Folder; by default the digits.")] = None,
    guidance: Annotated[float | None, typer.Option(help="By default the model's own.")] = None,
    latents: Annotated[bool, typer.Option(help="The model of latents instead.")] = False,
    spec: Annotated[str | None, typer.Option(help="JSON, as for --speculative-config.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    if latents and guidance is not None:
        raise typer.BadParameter("the model of latents has no guidance: leave --guidance out")
    # Progress of one engine; nothing else should be between the user and the pictures.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    from vllm_specplus.cli.model import IMAGE_MODEL, LATENTS_MODEL
    from vllm_specplus.image.pictures import pictures_of

    folder = str(model or (LATENTS_MODEL if latents else IMAGE_MODEL))
    own = {"method": "cspd", "model": f"{folder}/draft"} if latents else {"method": "jacobi"}
    llm = LLM(
        model=folder, skip_tokenizer_init=True, max_num_seqs=64, kv_cache_memory_bytes=1 << 28,
        speculative_config=json.loads(spec) if spec else own,
    )  # fmt: skip
    pictures = pictures_of(llm.llm_engine.model_config.hf_config, folder)
    names = labels.split(",")
    requests = [pictures.request(name, None) for name in names]
    extra = None if guidance is None else {"guidance_scale": guidance}
    done = llm.generate(
        [prompt for prompt, _ in requests],
        [
            SamplingParams(seed=seed + i, extra_args=extra, **pictures.defaults | sampling)
            for i, (_, sampling) in enumerate(requests)
        ],
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for i, (name, each) in enumerate(zip(names, done, strict=True)):
        (out / f"{i:03}-{name}.png").write_bytes(pictures.png(each.outputs[0]))
    typer.echo(f"{len(names)} pictures in {out}")


if __name__ == "__main__":
    typer.run(main)
