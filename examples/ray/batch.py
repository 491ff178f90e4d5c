"""Answers to many prompts by Ray Data: an engine that drafts on every device, fed by the cluster.

    python batch.py --model MODEL --prompts questions.jsonl --out answers --engines 2
    python batch.py --model DIR --prompts questions.jsonl --out answers --cpu

Prompts are lines of JSON with a "prompt"; answers are such lines with an "answer". A lost engine is
started again, and its batch asked again, three times at most.
"""

from __future__ import annotations

import argparse
import json
import os

import ray


class Engine:
    """One engine, an actor of Ray Data's."""

    def __init__(self, model: str, speculative_config: dict, max_tokens: int, cpu: bool):
        from vllm import LLM, SamplingParams

        fields = {"kv_cache_memory_bytes": 1 << 30} if cpu else {}
        self._llm = LLM(
            model, speculative_config=speculative_config, max_model_len=4096, **fields
        )  # fmt: skip
        self._params = SamplingParams(temperature=0, max_tokens=max_tokens)

    def __call__(self, batch: dict) -> dict:
        outputs = self._llm.generate(batch["prompt"].tolist(), self._params, use_tqdm=False)
        batch["answer"] = [each.outputs[0].text for each in outputs]
        return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="name, or a folder that every node has")
    parser.add_argument("--prompts", required=True, help="lines of JSON")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--speculative-config", default='{"method": "token_recycling"}')
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64, help="prompts in an engine at a time")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--cpu", action="store_true", help="engines on CPUs")
    args = parser.parse_args()
    ray.init(os.environ.get("RAY_ADDRESS", "auto"))
    devices = {"num_cpus": 1} if args.cpu else {"num_gpus": 1}
    answers = ray.data.read_json(args.prompts, lines=True).map_batches(
        Engine,
        fn_constructor_args=(
            args.model, json.loads(args.speculative_config), args.max_tokens, args.cpu,
        ),
        batch_size=args.batch, compute=ray.data.ActorPoolStrategy(size=args.engines),
        max_restarts=3, max_task_retries=3,  # by default Ray Data tries for ever
        **devices,
    )  # fmt: skip
    answers = answers.materialize()
    answers.write_json(args.out)
    print(f"{answers.count()} answers in {args.out}")


if __name__ == "__main__":
    main()
