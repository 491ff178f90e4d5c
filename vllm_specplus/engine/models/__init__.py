"""Models that vLLM does not have, registered by the plugin: name -> "module:class"."""

MODELS = {
    "CausalLatentsForClassToImage": (
        "vllm_specplus.engine.models.latents:CausalLatentsForClassToImage"
    ),
    "ChameleonForConditionalGeneration": (
        "vllm_specplus.engine.models.chameleon:ChameleonForConditionalGeneration"
    ),
    "ChameleonXLLMXForConditionalGeneration": (
        "vllm_specplus.engine.models.chameleon:ChameleonForConditionalGeneration"
    ),
    "LlamaGenForClassToImage": "vllm_specplus.engine.models.llamagen:LlamaGenForClassToImage",
    "LlamaGenForTextToImage": "vllm_specplus.engine.models.llamagen:LlamaGenForTextToImage",
}
