"""Rows of an expanded batch against one-row batches, both in vLLM's own sampler."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from tests.samplers.test_relaxed import VOCAB, make_rows, random_rows
from vllm_specplus.engine import row_processors
from vllm_specplus.engine.row_penalties import Texts, TokenCounts
from vllm_specplus.engine.row_sampling import RuleSampler, is_plain_greedy, sample_rows
from vllm_specplus.engine.row_seeds import RowSampler
from vllm_specplus.samplers.registry import make_rule
from vllm_specplus.step import DraftProbs, Rows

CPU = torch.device("cpu")
PROMPT = [1, 2, 2, 5]
MODES = ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]
INF = float("inf")


def processors_of(params: list[SamplingParams], outputs: list[list[int]]) -> LogitsProcessors:
    """vLLM's own, as its batch holds them in plain decoding."""
    count = len(params)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=count))
    added = [(i, each, PROMPT, outputs[i]) for i, each in enumerate(params)]
    made = []
    for kind in (MinTokensLogitsProcessor, LogitBiasLogitsProcessor, MinPLogitsProcessor):
        made.append(kind(config, CPU, False))
        made[-1].update_state(BatchUpdate(count, removed=(), added=added, moved=()))
    return LogitsProcessors(made)


def metadata_of(
    params: list[SamplingParams], outputs: list[list[int]], depths: list[int], logprobs: int | None
) -> SamplingMetadata:
    """vLLM's, of requests that have output ``outputs``, the last ``depths`` tokens drawn since
    their generators were seeded."""

    def each(name, dtype=torch.float32):
        return torch.tensor([getattr(one, name) for one in params], dtype=dtype)

    temperature, top_k, top_p = each("temperature"), each("top_k", torch.int32), each("top_p")
    top_k = torch.where(top_k < 1, VOCAB, top_k)
    names = ("frequency_penalty", "presence_penalty", "repetition_penalty")
    frequency, presence, repetition = map(each, names)
    allowed = None
    if any(one.allowed_token_ids for one in params):
        allowed = torch.zeros(len(params), VOCAB, dtype=torch.bool)
        for i, one in enumerate(params):
            if one.allowed_token_ids:
                allowed[i] = True
                allowed[i, one.allowed_token_ids] = False
    generators = {}
    for i, one in enumerate(params):
        if one.seed is not None and one.temperature > 0:
            generators[i] = torch.Generator().manual_seed(one.seed)
            past = metadata_of_draw(generators[i])
            for _ in range(depths[i]):
                Sampler()(torch.zeros(1, VOCAB), past)
    return SamplingMetadata(
        temperature=temperature, all_greedy=not temperature.any(),
        all_random=bool(temperature.all()),
        top_p=top_p if (top_p < 1).any() else None,
        top_k=top_k if (top_k < VOCAB).any() else None,
        generators=generators, max_num_logprobs=logprobs,
        no_penalties=not (frequency.any() or presence.any() or (repetition != 1).any()),
        prompt_token_ids=torch.tensor([PROMPT] * len(params)),
        frequency_penalties=frequency, presence_penalties=presence,
        repetition_penalties=repetition, output_token_ids=outputs,
        allowed_token_ids_mask=allowed,
        bad_words_token_ids={
            i: one.bad_words_token_ids for i, one in enumerate(params) if one.bad_words_token_ids
        },
        logitsprocs=processors_of(params, outputs),
    )  # fmt: skip


def texts_of(params: list[SamplingParams], outputs: list[list[int]]) -> Texts:
    """Behind the same prompt each, never seen before."""
    longest = len(PROMPT) + max(map(len, outputs)) + 3
    tokens = np.full((len(params), longest), 3, np.int32)  # what is behind a text is anything
    for row, output in zip(tokens, outputs, strict=True):
        row[: len(PROMPT) + len(output)] = PROMPT + output
    return Texts(
        request_ids=[f"r{i}" for i in range(len(params))],
        token_ids=tokens,
        num_tokens=np.array([len(PROMPT) + len(output) for output in outputs], np.int32),
        num_prompt=np.full(len(params), len(PROMPT), np.int32),
        versions=np.arange(len(params)),
        penalised=np.array([asks_for_a_penalty(one) for one in params]),
    )


def asks_for_a_penalty(one: SamplingParams) -> bool:
    return bool(one.frequency_penalty or one.presence_penalty or one.repetition_penalty != 1)


def penalties_of(params, outputs, rows, metadata):
    logits = torch.empty(len(rows.tokens), VOCAB)
    return TokenCounts().of_rows(texts_of(params, outputs), rows, metadata, logits)


def metadata_of_draw(generator: torch.Generator) -> SamplingMetadata:
    one = metadata_of([SamplingParams()], [[]], [0], None)
    one.generators = {0: generator}
    return one


def random_params(rng) -> SamplingParams:
    """Something of everything that vLLM admits."""

    def maybe(*values):
        return values[int(rng.integers(len(values)))]

    temperature = maybe(0.0, 0.6, 1.4)
    made = SamplingParams(
        temperature=temperature,
        seed=int(rng.integers(1000)),
        top_k=maybe(0, 3, 7) if temperature else 0,
        top_p=maybe(1.0, 0.7) if temperature else 1.0,
        min_p=maybe(0.0, 0.2),
        logit_bias=maybe(None, {3: 4.0, 5: -20.0}, {7: 1.5}),
        min_tokens=maybe(0, 4, 6),
        stop_token_ids=maybe([], [0, 9], [4]),
        max_tokens=50,
        presence_penalty=maybe(0.0, 0.7),
        frequency_penalty=maybe(0.0, -0.4),
        repetition_penalty=maybe(1.0, 1.3),
        allowed_token_ids=maybe(None, [0, 1, 3, 4, 6, 7, 9, 10]),
        structured_outputs=maybe(None, StructuredOutputsParams(json_object=True)),
    )
    # Set by vLLM with the tokenizer, from words.
    made._bad_words_token_ids = maybe(None, [[6], [2, 7]])
    return made


def path_of(rows: Rows, row: int, first: int) -> list[int]:
    path = []
    while rows.parents[row] >= 0:
        path.insert(0, int(rows.tokens[row]))
        row = first + int(rows.parents[row])
    return path


def differences(seed: int, mode: str) -> int:
    """Counts rows of a random step that one-row batches contradict."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 5))
    rows = random_rows(rng, count)
    params = [random_params(rng) for _ in range(count)]
    outputs = [rng.integers(0, VOCAB, int(rng.integers(0, 6))).tolist() for _ in range(count)]
    logits = torch.from_numpy(rng.normal(0, 2, (len(rows.tokens), VOCAB))).float()
    request = np.repeat(np.arange(count), np.diff(rows.starts))
    for row, r in enumerate(request):
        if params[r].structured_outputs and params[r].stop_token_ids and rng.random() < 0.5:
            stops = params[r].stop_token_ids  # a grammar that is at its end
            logits[row, [i for i in range(VOCAB) if i not in stops]] = -INF
    logprobs = [None, 0, 4][int(rng.integers(3))]
    metadata = metadata_of(params, copy.deepcopy(outputs), [0] * count, logprobs)
    penalties = penalties_of(params, outputs, rows, metadata)
    got = sample_rows(RowSampler(Sampler(mode)), logits.clone(), metadata, rows, penalties)
    wrong = 0
    for row, r in enumerate(request):
        path = path_of(rows, row, int(rows.starts[r]))
        alone = metadata_of([params[r]], [outputs[r] + path], [len(path)], logprobs)
        want = Sampler(mode)(logits[row : row + 1].clone(), alone)
        same = int(want.sampled_token_ids) == got.tokens[row]
        if same and logprobs is not None:
            ours, theirs = got.logprobs, want.logprobs_tensors
            values = theirs.logprobs[0]
            finite = values > -INF  # the others are ties
            same = (
                torch.allclose(ours.logprobs[row], values, rtol=1e-5, atol=1e-6)
                and torch.equal(
                    ours.logprob_token_ids[row][finite], theirs.logprob_token_ids[0][finite]
                )
                and int(ours.selected_token_ranks[row]) == int(theirs.selected_token_ranks[0])
            )
        wrong += not same
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_rows_are_what_one_row_batches_give(mode):
    assert [seed for seed in range(60) if differences(seed, mode)] == []


def test_the_comparison_would_notice(monkeypatch):
    monkeypatch.setattr(row_processors, "for_rows", lambda *_: LogitsProcessors())
    assert any(differences(seed, "raw_logprobs") for seed in range(20))


CHAIN = make_rows([1, 3, 4], [-1, 0, 1], [0, 3])


def test_raw_logprobs_know_no_min_tokens():
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[0], logprobs=1)
    logits = torch.zeros(3, VOCAB)
    logits[:, 0] = 5.0
    metadata = metadata_of([params], [[]], [0], 1)
    got = sample_rows(RowSampler(Sampler()), logits.clone(), metadata, CHAIN, None)
    assert (got.tokens != 0).tolist() == [True, True, False]  # the third is behind the minimum
    best = logits.log_softmax(-1)[:, 0]
    torch.testing.assert_close(got.logprobs.logprobs[:, 1], best)
    assert got.logprobs.logprob_token_ids[:, 1].tolist() == [0, 0, 0]


def test_a_finished_grammar_may_end_before_min_tokens():
    grammar = StructuredOutputsParams(choice=["a"])
    params = SamplingParams(
        temperature=0, min_tokens=9, stop_token_ids=[5], structured_outputs=grammar
    )
    logits = torch.full((3, VOCAB), -INF)
    logits[:, 5] = 1.0
    metadata = metadata_of([params], [[]], [0], None)
    got = sample_rows(RowSampler(Sampler()), logits, metadata, CHAIN, None)
    assert got.tokens.tolist() == [5, 5, 5]


def test_a_bias_makes_a_greedy_batch_more_than_an_argmax():
    plain = SamplingParams(temperature=0)
    biased = SamplingParams(temperature=0, logit_bias={3: 1.0})
    assert is_plain_greedy(metadata_of([plain], [[]], [0], None))
    assert not is_plain_greedy(metadata_of([plain, biased], [[], []], [0, 0], None))


def test_rules_judge_by_probabilities_behind_min_p():
    logits = torch.from_numpy(np.random.default_rng(3).normal(0, 2, (3, VOCAB))).float()
    params = SamplingParams(temperature=0.8, min_p=0.3)
    metadata = metadata_of([params], [[]], [0], None)
    none = DraftProbs(torch.empty(0, VOCAB), np.full(3, -1, np.int32), np.zeros(3, np.int32))
    sampler = RuleSampler("raw_logprobs", make_rule("without_replacement", {}), CPU)
    got = sampler.judge_rows(logits.clone(), metadata, CHAIN, None, none, np.zeros(1, bool))
    p = (logits / 0.8).softmax(-1)
    p = p.masked_fill(p < 0.3 * p.amax(-1, keepdim=True), 0)
    torch.testing.assert_close(got.target_probs, p / p.sum(-1, keepdim=True))


def test_noise_has_more_bits_than_a_float32():
    sampler = RuleSampler("raw_logprobs", make_rule("without_replacement", {}), CPU)
    rows = make_rows([1, 3, 4, 2], [-1, 0, 1, -1], [0, 3, 4])
    seeded = SamplingParams(temperature=1.0, seed=4)
    metadata = metadata_of([seeded, SamplingParams(temperature=1.0)], [[], []], [0, 0], None)
    for noise in sampler._noise(metadata, rows, np.zeros(2, bool), CPU):
        assert noise.dtype == torch.float64
        assert (noise * 2**32 != (noise * 2**32).round()).all()


def completed(*kinds) -> LogitsProcessors:
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=2))
    processors = LogitsProcessors([kind(config, CPU, False) for kind in kinds])
    row_processors.complete(processors, config, CPU, False)
    return processors


def test_what_vllm_leaves_out_beside_speculation_is_added():
    assert {type(each) for each in completed(MinTokensLogitsProcessor).all} == {
        MinTokensLogitsProcessor, LogitBiasLogitsProcessor, MinPLogitsProcessor,
    }  # fmt: skip


@pytest.mark.parametrize("kinds", [[], [MinTokensLogitsProcessor, LogitBiasLogitsProcessor]])
def test_processors_of_an_unknown_vllm_end_the_start(kinds):
    """They would be applied twice, or not per row."""
    with pytest.raises(ValueError, match="use a vLLM of the supported range"):
        completed(*kinds)
