"""Folders of models that see pictures, in small sizes, with weights and processors.

``python -m tests.contract.vision ROOT NAME`` in a process that finds torchvision (see
``beside_cpu/``): their processors do not load without it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.contract import folders

#: Of a picture: sides of the patches, and how many of them on a side become one token.
PATCH, MERGED = 8, 2
IDS = {
    f"{name}_token_id": folders.MARKS.index(mark)
    for name, mark in (
        ("vision_start", "<|vision_start|>"), ("vision_end", "<|vision_end|>"),
        ("image", "<|image_pad|>"), ("video", "<|video_pad|>"),
    )
}  # fmt: skip
#: Of three axes: how many rotary frequencies go by each.
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": PATCH,
    "spatial_merge_size": MERGED, "temporal_patch_size": 2, "out_hidden_size": 512,
}  # fmt: skip
#: name -> (what its classes are called by, what is different in its vision config, in the text's).
QWENS = {
    "qwen2_vl": (
        "Qwen2VL", {"embed_dim": 32, "hidden_size": 512, "mlp_ratio": 2},
        {"rope_parameters": SECTIONS},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL", {"window_size": 32, "fullatt_block_indexes": [1]},
        {"rope_parameters": SECTIONS},
    ),
    "qwen3_vl": (
        "Qwen3VL", {"deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        {"rope_parameters": SECTIONS | {"mrope_interleaved": True}},
    ),
}  # fmt: skip


def make(root: Path, name: str) -> Path:
    """Write the folder of one model and return it."""
    import torch

    folder = root / name
    folder.mkdir()
    torch.manual_seed(7)
    if name == "llava":
        _llava(folder)
    else:
        _qwen(folder, name)
    return folder


def _llava(folder: Path) -> None:
    import transformers as T
    from safetensors.torch import load_file, save_file
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side, patch = 32, 16
    config = T.LlavaConfig(
        text_config=T.LlamaConfig(**folders.TEXT),
        vision_config=T.CLIPVisionConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=side, patch_size=patch, projection_dim=64,
        ),
        image_token_index=IDS["image_token_id"], image_seq_length=(side // patch) ** 2,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    _save(folder, T.LlavaForConditionalGeneration, config)
    # vLLM knows the names that LLaVA's own checkpoints have.
    weights = {
        key.replace("vision_tower.", "vision_tower.vision_model.")
        if "vision_tower.vision_model." not in key else key: weight
        for key, weight in load_file(folder / "model.safetensors").items()
    }  # fmt: skip
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    T.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=T.AutoTokenizer.from_pretrained(folder), patch_size=patch,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<|image_pad|>",
    ).save_pretrained(folder)  # fmt: skip


def _qwen(folder: Path, name: str) -> None:
    import transformers as T
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    classes, vision, text = QWENS[name]
    config = getattr(T, f"{classes}Config")(
        text_config=folders.TEXT | text, vision_config=QWEN_VISION | vision, **IDS
    )
    _save(folder, getattr(T, f"{classes}ForConditionalGeneration"), config)
    sizes = {"patch_size": PATCH, "merge_size": MERGED, "temporal_patch_size": 2}
    videos = T.Qwen3VLVideoProcessor if name == "qwen3_vl" else T.Qwen2VLVideoProcessor
    getattr(T, f"{classes}Processor")(
        image_processor=Qwen2VLImageProcessorPil(min_pixels=256, max_pixels=64 * 64, **sizes),
        tokenizer=T.AutoTokenizer.from_pretrained(folder), video_processor=videos(**sizes),
    ).save_pretrained(folder)  # fmt: skip


def _save(folder: Path, model_class: type, config) -> None:
    """Weights in float32, spread as those of the text models; and the tokenizer."""
    config.architectures = [model_class.__name__]
    for each in (config, config.get_text_config()):
        each.initializer_range = 0.25
    model_class._from_config(config).float().save_pretrained(folder)
    config.save_pretrained(folder)
    folders.save_tokenizer(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2])
