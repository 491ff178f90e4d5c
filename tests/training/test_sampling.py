"""What drafts and targets write together."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.drafting.test_drafting import VOCAB, save_draft
from vllm_specplus.training.sampling import draw, end_tokens, write_on
from vllm_specplus.training.texts import Text


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A draft and a target, both in float32."""
    from transformers import AutoModelForCausalLM

    folders = [
        save_draft(tmp_path_factory.mktemp("model"), layers=layers, eos_token_id=None)
        for layers in (1, 2)
    ]
    return [AutoModelForCausalLM.from_pretrained(each).eval() for each in folders]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13)]


def given(count: int = 1) -> list[Text]:
    return [
        Text(f"{i} {n}", (*prompt, 1, 2), len(prompt), "target")
        for n in range(count) for i, prompt in enumerate(PROMPTS)
    ]  # fmt: skip


def greedy(model, prompt, length: int) -> list[int]:
    """Without a cache, without padding."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(length):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("by", ["sequence", "token"])
def test_greedily_each_writes_what_it_would_alone(models, share, by):
    """Side by side, prompts of several lengths."""
    draft, target = models
    texts = write_on(draft, target, given(), share, by, 0.0, 6, rng())
    expected = {prompt: greedy(draft if share else target, prompt, 6) for prompt in PROMPTS}
    assert len(texts) == len(PROMPTS)
    for text in texts:
        prompt = text.tokens[: text.start]
        assert list(text.tokens[text.start :]) == expected[prompt]
    assert greedy(draft, PROMPTS[0], 6) != greedy(target, PROMPTS[0], 6)


def test_by_sequence_a_share_is_the_drafts(models):
    draft, target = models
    texts = write_on(draft, target, given(40), 0.25, "sequence", 0.0, 2, rng())
    writers = Counter(text.writer for text in texts)
    assert sum(writers.values()) == 120
    assert 15 < writers["draft"] < 45  # 30 expected, five standard deviations off at 7
    for text in texts:
        writer = draft if text.writer == "draft" else target
        assert list(text.tokens[text.start :]) == greedy(writer, text.tokens[: text.start], 2)


def test_by_token_the_law_is_the_mixture(models):
    """Chi-square of the first token against the mixed distribution; that of one model fails."""
    draft, target = models
    count, share = 4000, 0.3
    prompt = PROMPTS[0]
    drawn = []
    for seed in range(count // 500):
        rows = draw([draft, target], share, [prompt] * 500, 1.0, 1, set(), rng(seed))
        drawn += [row[0] for row in rows]
    with torch.inference_mode():
        q, p = (
            model(torch.tensor([prompt])).logits[0, -1].softmax(-1).double()
            for model in (draft, target)
        )
    seen = torch.bincount(torch.tensor(drawn), minlength=VOCAB).double()

    def chi_square(law) -> float:
        expected = law / law.sum() * count
        return float(((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum())

    # 95 degrees of freedom: 150 is beyond the 0.9997 quantile.
    assert chi_square(share * q + (1 - share) * p) < 150
    assert chi_square(p) > 150
    assert chi_square(q) > 150


def test_a_text_ends_behind_an_end_token(models):
    draft, target = models
    first = greedy(target, PROMPTS[0], 3)
    target.generation_config.eos_token_id = [first[1], 10**6]
    try:
        assert end_tokens(target) == {first[1], 10**6}
        (text, *_) = [
            t for t in write_on(draft, target, given(), 0.0, "sequence", 0.0, 6, rng())
            if t.tokens[: t.start] == PROMPTS[0]
        ]  # fmt: skip
    finally:
        target.generation_config.eos_token_id = None
    assert list(text.tokens[text.start :]) == first[: first.index(first[1]) + 1]


def test_the_same_generator_writes_the_same(models):
    def write(seed):
        return write_on(*models, given(4), 0.5, "token", 1.0, 4, rng(seed))

    assert write(1) == write(1)
    assert write(1) != write(2)


def test_without_a_prompt_nothing_is_written(models):
    assert write_on(*models, [Text("a", (1, 2), 0, "given")], 1.0, "sequence", 1.0, 4, rng()) == []
