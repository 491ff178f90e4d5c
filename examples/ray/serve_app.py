"""A Ray Serve LLM application whose replicas draft with vllm-specplus.

    serve run serve_app:build model=MODEL                        GPUs, token recycling
    serve run serve_app:build model=DIR cpu=true                 replicas on CPUs
    serve run serve_app:build model=MODEL replicas=2 \
        speculative_config='{"method": "rasd"}'

The OpenAI API is on port 8000. Nothing else is needed: vllm-specplus is a vLLM plugin, which
the replicas load because it is installed on their nodes.
"""

import json

from pydantic import BaseModel
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_openai_app


class Arguments(BaseModel):
    """What follows ``serve_app:build`` on the command line, or ``args`` in a Serve config."""

    model: str
    """Hugging Face name, or a folder that every node has."""
    name: str = "model"
    """What clients call it."""
    speculative_config: str = '{"method": "token_recycling"}'
    """As for ``vllm serve``."""
    replicas: int = 1
    gpus_per_replica: int = 1
    """The target's tensor parallel size."""
    cpu: bool = False
    max_model_len: int = 4096


def build(arguments: Arguments) -> Application:
    engine = {
        "speculative_config": json.loads(arguments.speculative_config),
        "max_model_len": arguments.max_model_len,
        "tensor_parallel_size": arguments.gpus_per_replica,
    }
    hardware = {}
    if arguments.cpu:
        hardware = {"accelerator_config": {"kind": "cpu"}}
        engine["kv_cache_memory_bytes"] = 1 << 30
    config = LLMConfig(
        model_loading_config={"model_id": arguments.name, "model_source": arguments.model},
        deployment_config={"num_replicas": arguments.replicas},
        engine_kwargs=engine,
        log_engine_metrics=True,
        **hardware,
    )
    return build_openai_app({"llm_configs": [config]})
