"""Requests that mean no good, beside a steady one, in an engine of this process."""

from __future__ import annotations

import math
import random
from collections import Counter

from vllm_specplus.testing.engine import prompt_of, sampling_params

#: Where numbers end. Other types come no further than vLLM's front end.
INTEGERS = [0, 1, -1, 2, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, -(2**63)]
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-310, 1e-5, 1e39, -1e39, 1e308, math.inf, -math.inf,
          math.nan]  # fmt: skip
EDGES = [*INTEGERS, *FLOATS, 2**63, 10**30, True, "1", None, [], {}]
#: Fields of vLLM's ``SamplingParams`` that are whole numbers.
WHOLE = {"top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"}
#: Fields that are numbers, and what they mostly are: else every request would be refused.
SANE = {
    "temperature": [0, 0.01, 1.0, 2.0], "top_p": [1e-6, 0.5, 1.0], "top_k": [0, 1, 10**6],
    "min_p": [0.0, 1.0], "presence_penalty": [-2.0, 2.0], "frequency_penalty": [-2.0, 2.0],
    "repetition_penalty": [1e-45, 1e-30, 1.0, 1e30], "seed": [0, 2**63 - 1, -(2**63)],
    "max_tokens": [1, 2, 30], "min_tokens": [0, 1], "logprobs": [0, 1, 20],
    "prompt_logprobs": [0, 1],
}  # fmt: skip


def a_request(rng: random.Random, vocab: int, longest: int) -> tuple[object, dict]:
    """(prompt, fields of its ``SamplingParams``). Not with ids that do not exist: what refuses them
    is vLLM's tokenizer, which the tiny model has not."""
    some = rng.choice([0, 1, 2, 15, 16, 17, 33, longest - 1, longest, longest + 1])
    ids = [rng.randrange(vocab) for _ in range(some)]
    prompt: dict = {"prompt_token_ids": ids}
    if rng.random() < 0.5:
        prompt["cache_salt"] = rng.choice(["a", "b", "x" * 300, "\u0000"])
    fields: dict = {"detokenize": False}
    for name in rng.sample(sorted(SANE), rng.randrange(1, 6)):
        edges = INTEGERS if name in WHOLE else FLOATS
        fields[name] = rng.choice(edges if rng.random() < 0.15 else SANE[name])
    fields.setdefault("max_tokens", 40)
    odd = rng.random()
    if odd < 0.15:
        fields["logit_bias"] = {
            str(rng.choice([0, 5, vocab - 1, vocab, -1])): rng.choice(
                [0, 100, -100, 1e39, math.nan]
            )
        }
    elif odd < 0.3:
        fields["allowed_token_ids"] = rng.choice([[], [0], [5, 6], [vocab], [-1], [0] * 1000])
    elif odd < 0.4:
        fields["stop_token_ids"] = rng.choice([[], [7], [vocab], [-1], list(range(vocab))])
    elif odd < 0.5:
        fields["n"] = rng.choice([0, -1, 1, 2, 2**31])
    if rng.random() < 0.3:
        key = rng.choice(["enabled", "max_nodes", "lossless", "cache_salt", "nonsense"])
        fields["extra_args"] = {"specplus": {key: rng.choice([*EDGES, 3, 80, 81, "s" * 257])}}
        if rng.random() < 0.3:
            fields["extra_args"] = {"specplus": rng.choice(["{", "[" * 10_000, 1, []])}
    if rng.random() < 0.1:
        fields.setdefault("extra_args", {})["guidance_scale"] = rng.choice(EDGES)
    return prompt, fields


def serve(llm, steady: list, count: int, seed: int) -> dict:
    """Serve ``steady``, ``[[prompt, params], ...]``, one at a time and again and again while
    ``count`` hostile requests come, most of them aborted after a random number of steps. Returns
    {"steady": [ids of each], "refused", "aborted", "finish": {reason: how many}}."""
    rng, engine = random.Random(seed), llm.llm_engine
    vocab = engine.vllm_config.model_config.get_vocab_size()
    longest = engine.vllm_config.model_config.max_model_len
    texts: list[list[int]] = []
    finish: Counter = Counter()
    refused = aborted = come = 0
    ends: dict[str, int] = {}
    step = 0
    while come < count or engine.has_unfinished_requests():
        if come < count and f"steady-{len(texts) - 1}" not in ends:
            name = f"steady-{len(texts)}"
            prompt, fields = steady[len(texts) % len(steady)]
            engine.add_request(name, prompt_of(prompt), sampling_params(fields))
            texts.append([])
            ends[name] = 10**9
        for _ in range(min(rng.randrange(4), count - come)):
            name = f"hostile-{come}"
            come += 1
            prompt, fields = a_request(rng, vocab, longest)
            try:
                engine.add_request(name, prompt_of(prompt), sampling_params(fields))
            except Exception:  # a server answers HTTP 400 for it
                refused += 1
            else:
                ends[name] = step + rng.choice([0, 1, 2, 3, 5, 8, 10**9, 10**9])
        for out in engine.step():
            if not out.finished:
                continue
            if out.request_id.startswith("steady"):
                texts[int(out.request_id.split("-")[1])] = list(out.outputs[0].token_ids)
            else:
                finish.update(str(each.finish_reason) for each in out.outputs)
            ends.pop(out.request_id, None)
        gone = [name for name, end in ends.items() if end <= step]
        engine.abort_request(gone)
        aborted += len(gone)
        for name in gone:
            del ends[name]
        step += 1
    return {"steady": texts, "refused": refused, "aborted": aborted, "finish": dict(finish)}
