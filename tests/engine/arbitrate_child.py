"""Two engines in one process, between which an arbiter stands: prints what came of it.

python -m tests.engine.arbitrate_child DRAFT TARGET
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence

from vllm_specplus.arbitrage.arbiter import Arbiter, Limits
from vllm_specplus.arbitrage.engines import Refused
from vllm_specplus.arbitrage.local import LocalEngine
from vllm_specplus.arbitrage.metrics import Metrics
from vllm_specplus.arbitrage.steps import Job, Step, Writer, Written

ARGUMENTS = {
    "dtype": "float32", "max_model_len": 128, "max_num_seqs": 4, "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 24, "disable_log_stats": True,
}  # fmt: skip


class EverySecond:
    """A router that escalates every second step."""

    async def score(self, job: Job, steps: Sequence[Step], candidate: Written) -> float:
        return float(len(steps) % 2)


async def run(draft: str, target: str) -> dict:
    engines = [LocalEngine(folder, ".", ARGUMENTS) for folder in (draft, target)]
    try:
        arbiter = Arbiter(*engines, EverySecond(), Metrics(), Limits(step_tokens=8))
        prompt = await engines[0].chat_prompt([{"role": "user", "content": "How many eggs?"}])

        async def answer(threshold: float) -> list[dict]:
            job = Job(
                "How many eggs?", dict.fromkeys(Writer, prompt), 30, threshold,
                {"temperature": 0.0}, cache_salt="one", special_tokens=False,
            )  # fmt: skip
            steps = [step async for step in arbiter.answer(job)]
            return [[str(s.writer), s.text, s.tokens, str(s.end)] for s in steps]

        both, alone = await asyncio.gather(answer(0.5), answer(-1.0))
        whole = await engines[1].write(prompt, 8, (), {"temperature": 0.0}, False)
        left = asyncio.create_task(engines[1].write(prompt, 100, (), {"ignore_eos": True}, False))
        await asyncio.sleep(0.05)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        try:
            await engines[1].write(prompt * 100, 8, (), {}, False)
            refused = ""
        except Refused as error:
            refused = str(error)
        unfinished = engines[1]._engine.output_processor.get_num_unfinished_requests()
        return {
            "prompt": prompt, "both": both, "alone": alone, "first": whole.text,
            "cancelled": left.cancelled(), "unfinished": unfinished, "refused": refused,
        }  # fmt: skip
    finally:
        for engine in engines:
            engine.close()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(*sys.argv[1:]))))
