"""Are texts those of plain decoding, whatever the batch? In the form of arXiv 2510.22876.

    python benchmarks/batch_equality.py --model DIR --dataset question.jsonl \
        [--methods token_recycling,rasd] [--batches 1,2,4,8,16,32,64] [--limit 480] \
        [--max-tokens 50] [--dtype float32] --json OUT

The reference is greedy decoding without speculation, one request at a time. *Exact* is the share of
answers that are its answers, id by id (the paper decodes and tokenises again before it compares),
*partial* the mean share of the reference up to the first difference. Where an answer parts from the
reference, its token there is looked up among the reference's most probable ones: how far below the
best it is, in nats, tells a near tie that rounding decides from an error. ``none`` at the same
batches says what the engine's own rounding does.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from one_engine import ask_each, by_label, save

from vllm_specplus.bench.dataset import load_dataset, pick

#: Tokens of the reference's whose probabilities are kept, and what stands for all others.
LOOKED_UP, BEYOND = 20, "beyond"
#: Nats below the best from which a difference is no near tie, by the model's number format: some
#: steps of a logit between 16 and 32, and, in float32, of sums in another order.
LARGE = {"bfloat16": 0.5, "float16": 0.1, "float32": 0.001}


def serve(llm: Any, prompts: list[list[int]], params: Any, in_flight: int) -> list[Any]:
    """Answers ``prompts`` in their order, always as many of them at once; vLLM's outputs."""
    from vllm import TokensPrompt

    engine, outputs, sent = llm.llm_engine, {}, 0
    while len(outputs) < len(prompts):
        while sent < len(prompts) and sent - len(outputs) < in_flight:
            engine.add_request(str(sent), TokensPrompt(prompt_token_ids=prompts[sent]), params)
            sent += 1
        for output in engine.step():
            if output.finished:
                outputs[int(output.request_id)] = output.outputs[0]
    return [outputs[number] for number in range(len(prompts))]


def measure(args: argparse.Namespace, config: dict | None) -> dict[str, Any]:
    """In this process: one engine, all batches. Of plain decoding also the ``reference``."""
    from vllm import LLM, SamplingParams

    questions = pick(load_dataset(args.dataset).questions, args.limit)[0]
    batches = [int(each) for each in args.batches.split(",")]
    options = {} if config is None else {"speculative_config": config}
    llm = LLM(
        args.model, dtype=args.dtype, enforce_eager=True, max_num_seqs=max(batches),
        max_model_len=4096, kv_cache_memory_bytes=args.kv_mb << 20, seed=0,
        max_logprobs=LOOKED_UP, enable_prefix_caching=False, **options,
    )  # fmt: skip
    tokenizer = llm.get_tokenizer()
    texts = [
        tokenizer.apply_chat_template(
            list(each.messages), tokenize=False, add_generation_prompt=True
        )
        for each in questions
    ]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, detokenize=False)
    found: dict[str, Any] = {}
    if config is None:
        looking = params.clone()
        looking.logprobs = LOOKED_UP
        found["reference"] = [
            {
                "ids": list(output.token_ids),
                "top": [{t: p.logprob for t, p in step.items()} for step in output.logprobs],
            }
            for output in serve(llm, prompts, looking, 1)
        ]
    for batch in batches:
        outputs = serve(llm, prompts, params, batch)
        found[str(batch)] = [list(output.token_ids) for output in outputs]
    return found


def compared(reference: list[dict], answers: list[list[int]], large: float) -> dict[str, Any]:
    """The figures of one batch size, and every difference."""
    exact, partial, differences = 0, 0.0, []
    for number, (wanted, given) in enumerate(zip(reference, answers, strict=True)):
        ids = wanted["ids"]
        pairs = zip(ids, given, strict=False)
        parts = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(given)))
        exact += ids == given
        partial += parts / len(ids)
        if ids == given:
            continue
        below: float | str = BEYOND  # also where one of them ends and the other goes on
        if parts < min(len(ids), len(given)):
            top = {int(token): p for token, p in wanted["top"][parts].items()}
            if given[parts] in top:
                below = max(top.values()) - top[given[parts]]
        differences.append({"prompt": number, "position": parts, "nats_below_best": below})
    count = len(reference)
    far = [each for each in differences if not is_near(each["nats_below_best"], large)]
    return {
        "prompts": count,
        "exact": exact / count,
        "partial": partial / count,
        "large_differences": len(far),
        "differences": differences,
    }


def is_near(below: float | str, large: float) -> bool:
    return not isinstance(below, str) and below < large


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--methods", default="token_recycling,rasd")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64")
    parser.add_argument("--limit", type=int, default=480)
    parser.add_argument("--max-tokens", type=int, default=50)
    parser.add_argument("--dtype", choices=LARGE, default="float32")
    parser.add_argument("--kv-mb", type=int, default=2048)
    args, answers, about = ask_each(
        parser, lambda args: {"none": None} | by_label(args.methods), measure
    )
    reference = answers["none"].pop("reference")
    runs = []
    for method, of_batches in answers.items():
        for batch, given in of_batches.items():
            figures = compared(reference, given, LARGE[args.dtype])
            runs.append({"method": method, "batch": int(batch), **figures})
            print(
                f"{method}, {batch} at once: exact {figures['exact']:.1%}, partial "
                f"{figures['partial']:.1%}, {figures['large_differences']} beyond near ties",
                flush=True,
            )
    setting = {"dtype": args.dtype, "max_tokens": args.max_tokens, "large": LARGE[args.dtype]}
    save(args.json, about | {"setting": setting, "runs": runs})


if __name__ == "__main__":
    main()
