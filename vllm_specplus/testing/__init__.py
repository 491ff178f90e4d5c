"""What shows that a drafting method is lossless, for authors of methods and for our own tests.

Both checks run the method in real engines, in processes of their own, on tiny random models::

    from vllm_specplus.testing import assert_lossless_greedy, assert_lossless_sampled

    def test_text_is_the_same(tmp_path):
        assert_lossless_greedy({"method": "mine"}, tmp_path)

Methods are those that are installed (entry points); ``modules`` of :func:`engine.run` imports
others. A check fails too if nothing was drafted or nothing accepted: it would show nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_specplus.testing import distribution, engine, models

FIXED = {"policy": "fixed"}


def assert_lossless_greedy(method: dict[str, Any], folder: Path) -> dict[str, int]:
    """Assert that greedy text is that of plain decoding, token for token, in float32.

    ``method`` is a ``speculative_config``; all that it drafts is verified unless it has a
    ``control``. The 32 requests run twice, the second time as known text: chunked prefill, prefix
    caching, preemption, penalties, minimal lengths, allowed tokens. ``folder`` takes models and
    logs. Returns the engine's counters.
    """
    arguments = models.engine_arguments(models.build_model(folder / "greedy"))
    batches = [{"requests": models.mixed_requests()}] * 2
    plain = engine.run(folder, arguments, batches)
    assert plain["preemptions"] > 0, "nothing was preempted: the check would prove less"
    drafted = engine.run(folder, arguments | {"speculative_config": _all_of(method)}, batches)
    for batch, (expected, found) in enumerate(
        zip(plain["batches"], drafted["batches"], strict=True)
    ):
        for number, (right, text) in enumerate(zip(expected, found, strict=True)):
            first = _first_difference(right["ids"][0], text["ids"][0])
            assert first is None, (
                f"request {number} of batch {batch} differs from plain decoding from its output "
                f"token {first} on: {text['ids'][0][first:][:5]} instead of "
                f"{right['ids'][0][first:][:5]}"
            )
    return _used(drafted["counters"])


def assert_lossless_sampled(
    method: dict[str, Any], folder: Path, samples: int = 8_000
) -> dict[str, int]:
    """Assert that sampled text follows the target's distribution: a chi-square test.

    ``samples`` requests of one prompt draw three tokens under top-k sampling, whose joint
    distribution is enumerated; else as :func:`assert_lossless_greedy`. Fails by chance once in a
    thousand runs; needs scipy.
    """
    distribution.chisquare()  # says what is missing before an engine starts
    model = models.build_model(folder / "sampled", models.FEW_TOKENS, 0.12)
    arguments = models.sampling_arguments(model) | {"speculative_config": _all_of(method)}
    result = engine.run(folder, arguments, [models.sampling_batch(samples)])
    texts = [tuple(each["ids"][0][: models.DRAWN]) for each in result["batches"][0]]
    law = distribution.joint_probabilities(model, models.PROMPT, models.TOP_K, models.DRAWN)
    p = distribution.chi_square(law, texts)
    assert p > 1e-3, f"the drawn texts do not follow the target's distribution (p = {p:.1e})"
    return _used(result["counters"])


def _all_of(method: dict[str, Any]) -> dict[str, Any]:
    return {"num_speculative_tokens": 8, "control": FIXED} | method


def _used(counters: dict[str, int]) -> dict[str, int]:
    assert counters["draft_failures"] == 0, "drafting failed: see the log in the folder"
    assert counters["nodes_drafted"] > 0, "nothing was drafted: the check proved nothing"
    assert counters["nodes_accepted"] > 0, "no draft was accepted: the check proved little"
    return counters


def _first_difference(right: list[int], text: list[int]) -> int | None:
    if right == text:
        return None
    return next(
        (i for i, (a, b) in enumerate(zip(right, text, strict=False)) if a != b),
        min(len(right), len(text)),
    )
