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
TIED = {"tie_word_embeddings": True}
#: Of tied embeddings: without it, random models repeat the token that they read.
EMBEDDING_SCALE = {"gemma2": 0.03, "gemma3n": 0.003}
#: Of weights whose texts do not repeat themselves, where those of others do; and whose two best
#: tokens are never within rounding (of OLMo's, with the usual seed, 0.00004 nats apart once).
SEEDS = {"bloom": 31, "falcon_alibi": 28, "olmo": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MLA = {
    "kv_lora_rank": 512, "q_lora_rank": 64, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 64, "head_dim": None,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "num_key_value_heads": 16,
}  # fmt: skip
EXPERTS_BESIDE_ONE = {
    "moe_num_experts": 4, "moe_top_k": 2, "moe_intermediate_size": 64, "share_expert_dim": 64,
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "embed_dim": 32}

#: name -> (architecture, model_type, what is different from TEXT, vision config).
MODELS: dict[str, tuple[str, str, dict, dict | None]] = {
    "bloom": ("BloomForCausalLM", "bloom", TIED | {"head_dim": None}, None),
    "cohere2": ("Cohere2ForCausalLM", "cohere2", {"sliding_window": 64}, None),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "deepseek_v3", MLA, None),
    "falcon_alibi": ("FalconForCausalLM", "falcon", TIED | {"alibi": True, "head_dim": None}, None),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", TIED | {"sliding_window": 64}, None),
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
#: More families, whose texts are compared and whose launches are those of the ones above.
FULL_HEADS = {"head_dim": None, "num_key_value_heads": None}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FOUR_LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
MODELS |= {
    name: (architecture, family, changes, None)
    for name, (architecture, family, changes) in {
        "apertus": ("ApertusForCausalLM", "apertus", {}),
        "arcee": ("ArceeForCausalLM", "arcee", {}),
        "cohere": ("CohereForCausalLM", "cohere", {}),
        "deepseek_v2": (
            "DeepseekV2ForCausalLM", "deepseek_v2",
            MLA | {"q_lora_rank": None, "topk_method": "greedy", "scoring_func": "softmax",
                   "first_k_dense_replace": 1},
        ),
        "ernie4_5": ("Ernie4_5ForCausalLM", "ernie4_5", {}),
        "ernie4_5_moe": (
            "Ernie4_5_MoeForCausalLM", "ernie4_5_moe",
            {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "head_dim": None},
        ),
        "exaone4": ("Exaone4ForCausalLM", "exaone4", {"sliding_window": 64}),
        "falcon": ("FalconForCausalLM", "falcon", TIED | {"alibi": False, "head_dim": None}),
        "flex_olmo": ("FlexOlmoForCausalLM", "flex_olmo", EXPERTS | {"pad_token_id": 0}),
        "gemma": ("GemmaForCausalLM", "gemma", TIED),
        "gemma3n": (
            "Gemma3nForCausalLM", "gemma3n_text",
            TIED | {
                "sliding_window": 64, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32,
                "vocab_size_per_layer_input": 256, "laurel_rank": 16, "head_dim": 32,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "activation_sparsity_pattern": [0.0] * 4,
            },
        ),
        "gemma4": (
            "Gemma4ForCausalLM", "gemma4_text",
            {"sliding_window": 64, "hidden_size_per_layer_input": 0, "layer_types": FOUR_LAYERS,
             "vocab_size_per_layer_input": 256},
        ),
        "glm": ("GlmForCausalLM", "glm", {"pad_token_id": 0}),
        "gpt2": ("GPT2LMHeadModel", "gpt2", FULL_HEADS | {"intermediate_size": None}),
        "gpt_bigcode": ("GPTBigCodeForCausalLM", "gpt_bigcode", FULL_HEADS),
        "gpt_neox": ("GPTNeoXForCausalLM", "gpt_neox", FULL_HEADS),
        "gptj": ("GPTJForCausalLM", "gptj", FULL_HEADS | {"rotary_dim": 16}),
        "granitemoe": ("GraniteMoeForCausalLM", "granitemoe", LOCAL_EXPERTS),
        "granitemoehybrid": (
            "GraniteMoeHybridForCausalLM", "granitemoehybrid",
            LOCAL_EXPERTS | {"layer_types": ["attention"] * 4, "shared_intermediate_size": 64,
                             "position_embedding_type": "rope"},
        ),
        "granitemoeshared": (
            "GraniteMoeSharedForCausalLM", "granitemoeshared",
            LOCAL_EXPERTS | {"shared_intermediate_size": 64},
        ),
        "hunyuan": ("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", {}),
        "mimo": ("MiMoForCausalLM", "qwen2", {}),
        "minicpm": (
            "MiniCPMForCausalLM", "llama",
            {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
        ),
        "minicpm3": (
            "MiniCPM3ForCausalLM", "minicpm3",
            {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32,
             "qk_rope_head_dim": 32, "num_key_value_heads": 16, "head_dim": None},
        ),
        "ministral3": ("Ministral3ForCausalLM", "ministral3", {}),
        "nemotron": ("NemotronForCausalLM", "nemotron", {}),
        "olmo": ("OlmoForCausalLM", "olmo", {}),
        "olmo3": ("Olmo3ForCausalLM", "olmo3", {"sliding_window": 64}),
        "olmoe": ("OlmoeForCausalLM", "olmoe", EXPERTS | {"head_dim": None}),
        "opt": ("OPTForCausalLM", "opt", FULL_HEADS | {"ffn_dim": 64, "word_embed_proj_dim": 512}),
        "phi": ("PhiForCausalLM", "phi", {}),
        "qwen2_moe": (
            "Qwen2MoeForCausalLM", "qwen2_moe",
            EXPERTS | {"shared_expert_intermediate_size": 64, "head_dim": None},
        ),
        "seed_oss": ("SeedOssForCausalLM", "seed_oss", {}),
        "smollm3": ("SmolLM3ForCausalLM", "smollm3", {"pad_token_id": 0}),
        "stablelm": ("StableLmForCausalLM", "stablelm", {"head_dim": None}),
        "starcoder2": ("Starcoder2ForCausalLM", "starcoder2", {"sliding_window": 64}),
        "step3_text": (
            "Step3TextForCausalLM", "step3_text",
            EXPERTS_BESIDE_ONE | {
                "num_attention_groups": 1, "num_key_value_heads": 1, "share_q_dim": 128,
                "max_position_embedding": 65536, "moe_layers_enum": "1,2,3",
            },
        ),
        "step3p5": (
            "Step3p5ForCausalLM", "step3p5",
            EXPERTS_BESIDE_ONE | {
                "num_attention_groups": 8, "sliding_window": 64, "layer_types": FOUR_LAYERS,
                "use_head_wise_attn_gate": True, "rope_theta": 10000.0,
                # Else vLLM takes transformers' table of rotary settings by layer for one of them.
                "yarn_only_types": ["no_layer"],
            },
        ),
        "vaultgemma": ("VaultGemmaForCausalLM", "vaultgemma", {"sliding_window": 64}),
    }.items()
}  # fmt: skip
#: Those that transformers does not know: vLLM makes their weights (``drawn_weights.py``).
DRAWN = ("mimo", "minicpm", "step3_text", "step3p5")
#: Whose config is of a family like theirs, for want of their own.
STAND_INS = ("mimo", "minicpm")
#: Whose layers self-speculation can leave out (``engine/target_layers.py``); others are refused.
LAYERS_APART = (
    "apertus", "ernie4_5", "ernie4_5_moe", "gemma", "glm4", "glm4_moe", "granite", "granitemoe",
    "llama3", "mimo", "ministral3", "mistral", "mixtral", "nemotron", "olmoe", "phi4", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "step3p5",
)  # fmt: skip
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

    ``weights``: random ones in float32, spread so that greedy text has many distinct tokens; not
    of those that are :data:`DRAWN`.
    """
    folder = root / name
    if (folder / "config.json").is_file():
        return folder
    from transformers import CONFIG_MAPPING, AutoConfig

    architecture, family, changes, vision = MODELS[name]
    text = {key: value for key, value in (TEXT | changes).items() if value is not None}
    if "sliding_window" in changes:
        text["sliding_window"] = changes["sliding_window"]
    if family not in CONFIG_MAPPING:
        folder.mkdir(parents=True)
        keys = {"architectures": [architecture], "model_type": family, "dtype": "float32"} | text
        (folder / "config.json").write_text(json.dumps(keys))
        save_tokenizer(folder)
        return folder
    if vision is not None:
        config = AutoConfig.for_model(family, text_config=text, vision_config=vision)
    else:
        config = AutoConfig.for_model(family, **text)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    if weights and name not in DRAWN:
        import torch
        import transformers

        torch.manual_seed(SEEDS.get(name, 7))
        for each in (config, config.get_text_config()):
            each.initializer_range = 0.25
        known = architecture.replace("MRopeText", "Qwen2")
        model = getattr(transformers, known)._from_config(config)
        if config.get_text_config().tie_word_embeddings:
            with torch.no_grad():
                embedding = model.get_input_embeddings().weight.mul_(EMBEDDING_SCALE.get(name, 0.3))
                if name == "gemma3n":  # makes NaN of zeros, which the padding's row is at first
                    embedding[0] = embedding[1]
        model.to(torch.float32).save_pretrained(folder)
        config.architectures = [architecture]
        config.save_pretrained(folder)
    if name.endswith("fp8kv"):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": FP8_KV}))
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of words, with the marks of parsers and pictures."""
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
