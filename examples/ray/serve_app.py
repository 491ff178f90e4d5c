"""A Ray Serve LLM application whose replicas draft with vllm-specplus.

    serve run serve_app:build model=MODEL                        GPUs, token recycling
    serve run serve_app:build model=DIR cpu=true                 replicas on CPUs
    serve run serve_app:build model=MODEL replicas=2 most_replicas=8 \
        speculative_config='{"method": "rasd"}'

The OpenAI API is on port 8000. Nothing else is needed: vllm-specplus is a vLLM plugin, which
the replicas load because it is installed on their nodes.
"""

import json

from pydantic import BaseModel, model_validator
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
    """As many, or with ``most_replicas`` at least as many."""
    most_replicas: int | None = None
    """Up to as many where requests wait: Serve adds replicas, and a cluster that grows nodes."""
    requests_per_replica: int = 16
    """How many at a time are enough for one, where their number follows the load."""
    gpus_per_replica: int = 1
    """The target's tensor parallel size."""
    revision: str = ""
    """Another one replaces the replicas one by one, each after its last request."""
    cpu: bool = False
    max_model_len: int = 4096
    kv_cache_gb: float = 1.0
    """Of a replica on a CPU."""

    @model_validator(mode="after")
    def _most_is_more(self):
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise ValueError(
                f"most_replicas ({self.most_replicas}) is less than replicas ({self.replicas})"
            )
        return self


def build(arguments: Arguments) -> Application:
    engine = {
        "speculative_config": json.loads(arguments.speculative_config),
        "max_model_len": arguments.max_model_len,
        "tensor_parallel_size": arguments.gpus_per_replica,
    }
    hardware = {}
    if arguments.cpu:
        hardware = {"accelerator_config": {"kind": "cpu"}}
        engine["kv_cache_memory_bytes"] = int(arguments.kv_cache_gb * 2**30)
    # A replica that is replaced goes on until its last answer is complete.
    deployment = {"graceful_shutdown_timeout_s": 600}
    if arguments.most_replicas is None:
        deployment["num_replicas"] = arguments.replicas
    else:
        deployment["autoscaling_config"] = {
            "min_replicas": arguments.replicas,
            "max_replicas": arguments.most_replicas,
            "target_ongoing_requests": arguments.requests_per_replica,
        }
    config = LLMConfig(
        model_loading_config={"model_id": arguments.name, "model_source": arguments.model},
        deployment_config=deployment,
        engine_kwargs=engine,
        runtime_env={"env_vars": {"SPECPLUS_REVISION": arguments.revision}},
        log_engine_metrics=True,  # ours too, by replica, on the metrics port of its node
        **hardware,
    )
    return build_openai_app({"llm_configs": [config]})
