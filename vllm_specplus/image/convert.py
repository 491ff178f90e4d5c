"""The public LlamaGen checkpoints as a folder that vLLM serves.

    python -m vllm_specplus.image.convert --ar c2i_B_256.pt --vq vq_ds16_c2i.pt --out DIR
    python -m vllm_specplus.image.convert --ar t2i_XL_stage1_256.pt --vq vq_ds16_t2i.pt \
        --text-encoder flan-t5-xl --out DIR

The files are read as tensors only: nothing in them is executed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated

import torch
import typer

from vllm_specplus.image import captions, llamagen
from vllm_specplus.image.vq import VQConfig, VQModel

#: Attention heads of the public models, by hidden size.
HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}


def read(path: Path) -> dict[str, torch.Tensor]:
    """The model in a checkpoint, whichever key it is under; averaged over training if it is."""
    # Training may leave its command line beside the tensors.
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model_ema", "model", "module", "state_dict"):
        if key in found and isinstance(found[key], dict):
            return found[key]
    return found


def vq_config(weights: dict[str, torch.Tensor]) -> VQConfig:
    """Sizes of a VQ model, from its tensors."""
    codes, dim = weights["quantize.embedding.weight"].shape
    base, image_channels = weights["encoder.conv_in.weight"].shape[:2]
    count = 1 + max(
        int(name.split(".")[2]) for name in weights if name.startswith("encoder.conv_blocks.")
    )

    def outputs(level: int) -> int:
        return len(weights[f"encoder.conv_blocks.{level}.res.0.conv2.weight"])

    blocks = {name for name in weights if name.startswith("encoder.conv_blocks.0.res.")}
    return VQConfig(
        codebook_size=codes,
        codebook_dim=dim,
        image_channels=image_channels,
        channels=base,
        multipliers=tuple(outputs(level) // base for level in range(count)),
        blocks=1 + max(int(name.split(".")[4]) for name in blocks),
        latent_channels=len(weights["encoder.conv_out.weight"]),
    )


def main(
    ar: Annotated[Path, typer.Option(help="Checkpoint of the autoregressive model.")],
    vq: Annotated[Path, typer.Option(help="Checkpoint of its VQ model.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    grid_size: Annotated[int, typer.Option(help="Codes of a side: 16 at 256 pixels.")] = 16,
    heads: Annotated[int | None, typer.Option(help="If the size is no public one.")] = None,
    text_encoder: Annotated[
        Path | None,
        typer.Option(help="Folder of the T5 that reads captions, to copy its encoder from."),
    ] = None,
) -> None:
    weights = read(ar)
    if not weights.keys() & {llamagen.LABELS, llamagen.UNCONDITIONAL}:
        raise typer.BadParameter(f"{ar} is no LlamaGen: it embeds neither classes nor captions")
    hidden = weights["tok_embeddings.weight"].shape[1]
    if heads is None and hidden not in HEADS:
        raise typer.BadParameter(f"a model of hidden size {hidden} is no public one: give --heads")
    config = llamagen.config_of(weights, heads or HEADS[hidden], grid_size)
    if text_encoder is not None:
        if config.caption_size is None:
            raise typer.BadParameter("--text-encoder is for models of text, and this has classes")
        try:
            found = captions.load(text_encoder, config.caption_size)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"--text-encoder: {error}") from None
        for part in found:
            part.save_pretrained(out / captions.FOLDER)
    tensors = read(vq)
    model = VQModel(vq_config(tensors))
    # A record of which codes training used; nothing to decode with.
    tensors.pop("quantize.codebook_used", None)
    model.load_state_dict(tensors)
    # Rotary tables are made anew.
    own = {name: tensor for name, tensor in weights.items() if name != "freqs_cis"}
    codebook = model.quantize.vectors().detach()
    sampling = llamagen.reference_sampling(config)
    llamagen.save(out, own | {"codebook": codebook}, config, sampling)
    model.save(out)


if __name__ == "__main__":
    typer.run(main)
