"""The public MAR checkpoints as a folder to make pictures from.

    python -m vllm_specplus.image.continuous.convert --target mar_huge/checkpoint-last.pth \\
        --draft mar_base/checkpoint-last.pth --vae kl16.ckpt --out DIR

``PictureMaker(DIR, Recipe(...))`` then makes them. The files are read as tensors only: nothing in
them is executed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from vllm_specplus.image.continuous.masked import MaskedConfig, MaskedLatents
from vllm_specplus.image.continuous.vae import KLConfig, KLDecoder
from vllm_specplus.image.convert import read
from vllm_specplus.image.vq import taming_tensors

#: Attention heads of MAR-B, -L and -H, by width.
HEADS = {768: 12, 1024: 16, 1280: 16}


def mar_config(tensors: dict[str, torch.Tensor], heads: int | None = None) -> MaskedConfig:
    """Sizes of a MAR, from its tensors; ValueError if they are no MAR's."""
    try:
        classes, encoder = tensors["class_emb.weight"].shape
        _, length, decoder = tensors["diffusion_pos_embed_learned"].shape
        positions = tensors["encoder_pos_embed_learned"].shape[1]
        head_width, size = tensors["diffloss.net.input_proj.weight"].shape
    except KeyError as error:
        raise ValueError(f"not a MAR: it has no {error.args[0]}") from None
    if heads is None and not {encoder, decoder} <= HEADS.keys():
        raise ValueError(f"a MAR of width {encoder} is no public one: say how many heads it has")

    def depth(part: str) -> int:
        return 1 + max(int(name.split(".")[part.count(".")]) for name in tensors
                       if name.startswith(part))  # fmt: skip

    return MaskedConfig(
        length=length, size=size, num_classes=classes, buffer_size=positions - length,
        encoder_width=encoder, encoder_depth=depth("encoder_blocks."),
        encoder_heads=heads or HEADS[encoder], decoder_width=decoder,
        decoder_depth=depth("decoder_blocks."), decoder_heads=heads or HEADS[decoder],
        head_width=head_width, head_depth=depth("diffloss.net.res_blocks."),
    )  # fmt: skip


def mar(path: Path, heads: int | None = None) -> MaskedLatents:
    tensors = read(path)
    model = MaskedLatents(mar_config(tensors, heads))
    model.load_state_dict(tensors)
    return model.eval()


def kl_decoder(path: Path) -> KLDecoder:
    """Of a checkpoint of the whole autoencoder, in latent diffusion's names."""
    tensors = read(path)
    own = {name: t for name, t in tensors.items() if name.startswith("decoder.")}
    if "post_quant_conv.weight" not in tensors or not own:
        raise ValueError(f"{path} is no autoencoder: it has no decoder or no post_quant_conv")
    levels = 1 + max(int(n.split(".")[2]) for n in own if n.startswith("decoder.up."))
    channels = len(tensors["decoder.norm_out.weight"])
    config = KLConfig(
        size=len(tensors["post_quant_conv.weight"]),
        image_channels=len(tensors["decoder.conv_out.weight"]),
        channels=channels,
        multipliers=tuple(
            len(tensors[f"decoder.up.{i}.block.0.conv2.weight"]) // channels for i in range(levels)
        ),
        # The decoder has one more of them than the encoder.
        blocks=max(int(n.split(".")[4]) for n in own if n.startswith("decoder.up.0.block.")),
    )  # fmt: skip
    model = KLDecoder(config)
    model.load_state_dict(taming_tensors(tensors, levels))
    return model.eval()


def main(
    target: Annotated[Path, typer.Option(help="Checkpoint of the model.")],
    draft: Annotated[Path, typer.Option(help="Checkpoint of the smaller one that drafts.")],
    vae: Annotated[Path, typer.Option(help="Checkpoint of their autoencoder.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    heads: Annotated[int | None, typer.Option(help="If the sizes are no public ones.")] = None,
) -> None:
    try:
        models = mar(target, heads), mar(draft, heads)
        decoder = kl_decoder(vae)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for key in ("length", "size", "num_classes"):
        one, other = (getattr(model.config, key) for model in models)
        if one != other:
            raise typer.BadParameter(f"target and draft differ in {key}: {one} and {other}")
    models[0].save(out)
    models[1].save(out / "draft")
    decoder.save(out)


if __name__ == "__main__":
    typer.run(main)
