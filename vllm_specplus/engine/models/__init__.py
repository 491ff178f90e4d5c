"""Models that vLLM does not have, registered by the plugin: name -> "module:class"."""

MODELS = {
    "LlamaGenForClassToImage": "vllm_specplus.engine.models.llamagen:LlamaGenForClassToImage",
}
