"""Requests through a real engine, in a process of its own.

``python -m vllm_specplus.testing.engine JOB OUT`` reads a job (JSON) and writes what came out;
:func:`run` writes and starts it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from zlib import crc32

#: Seconds that an engine may take.
TIMEOUT = 600


def run(
    folder: Path,
    engine: dict[str, Any],
    batches: list[dict[str, Any]],
    modules: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Run batches one after the other in one engine.

    ``engine`` holds arguments of ``vllm.LLM``; a batch is ``{"requests": [[prompt, sampling
    params], ...]}`` or ``{"prompt", "params", "repeat"}``; ``modules`` are imported before the
    engine starts, for methods that no entry point names. Returns ``{"batches": [[{"ids", "text",
    ...}]], "counters", "preemptions"}``; raises RuntimeError with the end of the log if the engine
    fails. Job, outcome and log stay in ``folder``.
    """
    number = len(list(folder.glob("engine*.json")))
    job, out = folder / f"engine{number}.json", folder / f"outcome{number}.json"
    defaults = {"kv_cache_memory_bytes": 1 << 28, "disable_log_stats": True, "seed": 0}
    content = {"engine": defaults | engine, "batches": batches, "modules": list(modules)}
    job.write_text(json.dumps(content))
    log = out.with_suffix(".log")
    with log.open("w") as stream:
        status = subprocess.run(
            [sys.executable, "-m", "vllm_specplus.testing.engine", str(job), str(out)],
            env=environment(), stdout=stream, stderr=stream, timeout=TIMEOUT,
        ).returncode  # fmt: skip
    if status:
        raise RuntimeError(f"engine process failed ({status}):\n{log.read_text()[-8000:]}")
    return json.loads(out.read_text())


def environment() -> dict[str, str]:
    """Return what an engine of a test needs in its environment: itself in one process."""
    # The Triton interpreter, which tests of kernels ask for, is no place for an engine.
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return inherited | {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        # The models are tiny: a second OpenMP thread only spins against the test process.
        "OMP_NUM_THREADS": "1",
    }


def sampling_params(fields: dict[str, Any]):
    """Make ``SamplingParams`` of plain data; ``json_schema`` asks for structured output."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    fields = dict(fields)
    if "json_schema" in fields:
        schema = fields.pop("json_schema")
        fields["structured_outputs"] = StructuredOutputsParams(json=schema)
    if "logit_bias" in fields:  # JSON has made text of the ids
        fields["logit_bias"] = {int(key): value for key, value in fields["logit_bias"].items()}
    return SamplingParams(**fields)


def prompt_of(given):
    """Make a prompt of text, token ids, prompt embeddings as lists of floats, or the keys of a
    ``TokensPrompt`` or a ``TextPrompt``, whose picture is lists of bytes [height, width, 3]."""
    from vllm import TokensPrompt
    from vllm.inputs import EmbedsPrompt

    if isinstance(given, str):
        return given
    if isinstance(given, dict):
        return _with_picture(given)
    if given and isinstance(given[0], list):
        import torch

        return EmbedsPrompt(prompt_embeds=torch.tensor(given))
    return TokensPrompt(prompt_token_ids=given)


def _with_picture(given: dict[str, Any]) -> dict[str, Any]:
    media = given.get("multi_modal_data")
    if media is None:
        return given
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(np.array(media["image"], np.uint8))
    return given | {"multi_modal_data": media | {"image": picture}}


def requests_of(batch: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Spell a batch out."""
    if batch.get("repeat"):
        return [(batch["prompt"], batch["params"])] * batch["repeat"]
    return batch["requests"]


def generate(
    llm, requests: list[tuple[Any, dict[str, Any]]], adapters: list[str | None] | None = None
) -> list[dict[str, Any]]:
    """Answer the requests, as plain data. ``adapters``: folder of each one's LoRA adapter."""
    prompts = [prompt_of(prompt) for prompt, _ in requests]
    outputs = llm.generate(
        prompts,
        [sampling_params(s) for _, s in requests],
        use_tqdm=False,
        lora_request=adapters and lora_requests(adapters),
    )
    return [
        {
            "prompt": list(o.prompt_token_ids),
            "ids": [list(c.token_ids) for c in o.outputs],
            "text": [c.text for c in o.outputs],
            "finish": [c.finish_reason for c in o.outputs],
            "logprobs": [
                c.logprobs and [{t: lp.logprob for t, lp in step.items()} for step in c.logprobs]
                for c in o.outputs
            ],
        }
        for o in outputs
    ]


def lora_requests(folders: list[str | None]) -> list[Any]:
    """vLLM's ``LoRARequest`` of each folder, None for none."""
    from vllm.lora.request import LoRARequest

    # vLLM knows an adapter by its number, from batch to batch.
    return [
        None if folder is None else LoRARequest(Path(folder).name, crc32(folder.encode()), folder)
        for folder in folders
    ]


def counters_of(worker) -> dict[str, Any] | None:
    """Read, in a worker, what was drafted and accepted."""
    drafter = getattr(worker.model_runner, "drafter", None)
    return drafter.counters.as_dict() if hasattr(drafter, "counters") else None


def metrics_of(llm) -> dict[str, Any]:
    """Read vLLM's own metrics by their names, none where they are switched off."""
    if not llm.llm_engine.log_stats:
        return {}
    return {m.name.removeprefix("vllm:"): m for m in llm.get_metrics()}


def main(job_path: str, out_path: str) -> None:
    """Run one job."""
    job = json.loads(Path(job_path).read_text())
    from vllm_specplus.plugin import register

    register()
    for module in job["modules"]:
        importlib.import_module(module)
    from vllm import LLM

    llm = LLM(**job["engine"])
    batches = [generate(llm, requests_of(batch)) for batch in job["batches"]]
    result = {
        "batches": batches,
        "counters": llm.collective_rpc(counters_of)[0],
        "preemptions": getattr(metrics_of(llm).get("num_preemptions"), "value", None),
    }
    llm.llm_engine.engine_core.shutdown()
    Path(out_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
