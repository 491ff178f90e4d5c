"""Models whose sizes are known: as ``config.json``, and as a method sees its target."""

from vllm_specplus.target import Target


def target(tokenizer=None, vocab_size: int = 9, **fields) -> Target:
    """A small Llama on one rank, unless ``fields`` say otherwise."""
    return Target(
        load_tokenizer=lambda: tokenizer,
        vocab_size=vocab_size,
        **(
            {"family": "llama", "num_layers": 4, "tensor_parallel_size": 1, "hidden_size": 8}
            | fields
        ),
    )


LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
