"""Folders of models as vLLM's configuration sees them: a config.json of the real architecture in
small sizes, and a tokenizer with the marks of the reasoning parsers. No weights."""

from __future__ import annotations

import json
from pathlib import Path

TEXT = {
    "vocab_size": 256, "hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 32,
    "max_position_embeddings": 65536, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MLA = {
    "kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 64, "head_dim": None,
    "num_key_value_heads": 16,
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "embed_dim": 32}

#: name -> (architecture, model_type, what is different from TEXT, vision config).
MODELS: dict[str, tuple[str, str, dict, dict | None]] = {
    "bloom": ("BloomForCausalLM", "bloom", {"head_dim": None}, None),
    "cohere2": ("Cohere2ForCausalLM", "cohere2", {"sliding_window": 64}, None),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "deepseek_v3", MLA, None),
    "falcon_alibi": ("FalconForCausalLM", "falcon", {"alibi": True, "head_dim": None}, None),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", {"sliding_window": 64}, None),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text", {"sliding_window": 64}, None),
    "glm4": ("Glm4ForCausalLM", "glm4", {"pad_token_id": 0}, None),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        "glm4_moe",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        None,
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
        None,
    ),
    "granite": ("GraniteForCausalLM", "granite", {}, None),
    "kimi_k2": ("DeepseekV3ForCausalLM", "deepseek_v3", MLA, None),
    "llama3": ("LlamaForCausalLM", "llama", {}, None),
    "llama4": (
        "Llama4ForCausalLM",
        "llama4_text",
        {"num_local_experts": 4, "intermediate_size_mlp": 64, "attention_chunk_size": 64},
        None,
    ),
    "mistral": ("MistralForCausalLM", "mistral", {"sliding_window": None}, None),
    "mistral_window": ("MistralForCausalLM", "mistral", {"sliding_window": 4096}, None),
    "mistral_short_window": ("MistralForCausalLM", "mistral", {"sliding_window": 64}, None),
    "mixtral": ("MixtralForCausalLM", "mixtral", {"num_local_experts": 4}, None),
    "mrope": (
        "MRopeTextForCausalLM",
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            }
        },
        None,
    ),
    "olmo2": ("Olmo2ForCausalLM", "olmo2", {}, None),
    "phi4": ("Phi3ForCausalLM", "phi3", {"pad_token_id": 0, "sliding_window": None}, None),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", {}, None),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
        VISION,
    ),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", {}, None),
    "qwen3_fp8kv": ("Qwen3ForCausalLM", "qwen3", {}, None),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "qwen3_moe", EXPERTS, None),
    "qwen3_next": ("Qwen3NextForCausalLM", "qwen3_next", EXPERTS, None),
}
FP8_KV = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {},
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False,
                        "symmetric": True},
}  # fmt: skip
MARKS = (
    "<unk>", "<s>", "</s>", "<pad>", "<think>", "</think>", "[THINK]", "[/THINK]", "<|channel|>",
    "<|message|>", "<|start|>", "<|end|>", "analysis", "final", "assistant", "<tool_call>",
    "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<minimax:tool_call>", "{", "}",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


def make(root: Path, name: str, weights: bool = False) -> Path:
    """Write the folder of one model, unless it is there, and return it.

    ``weights``: random ones in float32, spread so that greedy text has many distinct tokens.
    """
    folder = root / name
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoConfig

    architecture, family, changes, vision = MODELS[name]
    text = {key: value for key, value in (TEXT | changes).items() if value is not None}
    if "sliding_window" in changes:
        text["sliding_window"] = changes["sliding_window"]
    if vision is not None:
        config = AutoConfig.for_model(family, text_config=text, vision_config=vision)
    else:
        config = AutoConfig.for_model(family, **text)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    if weights:
        import torch
        import transformers

        torch.manual_seed(7)
        for each in (config, config.get_text_config()):
            each.initializer_range = 0.25
        known = architecture.replace("MRopeText", "Qwen2")
        model = getattr(transformers, known)._from_config(config)
        model.to(torch.float32).save_pretrained(folder)
        config.architectures = [architecture]
        config.save_pretrained(folder)
    if name.endswith("fp8kv"):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": FP8_KV}))
    _tokenizer(folder)
    return folder


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*MARKS, *(f"w{i}" for i in range(256 - len(MARKS)))]
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", additional_special_tokens=list(MARKS[4:]),
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
