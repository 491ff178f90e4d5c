"""What ends a chain early, by hand; and that the target's distribution does not mind.

The laws are computed exactly, in the four-token world of ``tree_rules_oracle.py``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests import tree_rules_oracle as oracle
from vllm_specplus.drafting.acceptance_head import AcceptanceHead, head_size
from vllm_specplus.drafting.stop_config import (
    AcceptanceHeadStop,
    AdaptiveConfidenceStop,
    ConfidenceStop,
    TauStop,
)
from vllm_specplus.drafting.stopping import Confidence, Stop, adapted, make_stop

Text = tuple[int, ...]


def run(stop: Stop, confidences: list[float], most: int = 20) -> int:
    """How many tokens of one request's draft come, of these confidences."""
    stop.begin(["r"], np.array([most]))
    for depth, confidence in enumerate(confidences[:most]):
        if not stop.goes_on(depth, np.array([0]), np.array([confidence], np.float32))[0]:
            return depth + 1
    return most


def test_a_draft_ends_behind_the_token_that_is_not_sure_enough():
    stop = make_stop(ConfidenceStop(rule="confidence"))
    assert isinstance(stop, Confidence)
    assert run(stop, [0.9, 0.81, 0.79, 0.99]) == 3
    assert run(stop, [0.1]) == 1
    assert run(stop, [0.9] * 30, most=25) == 25


def test_the_threshold_follows_the_acceptance():
    """Draft & Verify's worked round: 0.5 and 8 of 8 make 0.75, below 0.9."""
    assert adapted(0.8, 0.75, 0.9, 0.01, drafted=8, most=8) == pytest.approx(0.801)
    # Enough is accepted: it stays if the draft was as long as it might be, else it falls.
    assert adapted(0.8, 0.95, 0.9, 0.01, drafted=8, most=8) == pytest.approx(0.8)
    assert adapted(0.8, 0.95, 0.9, 0.01, drafted=3, most=8) == pytest.approx(0.799)


def test_every_request_has_a_threshold_of_its_own():
    stop = make_stop(AdaptiveConfidenceStop(rule="adaptive_confidence"))
    stop.begin(["good", "bad"], np.array([8, 8]))
    for _ in range(40):
        stop.verified("good", 3, 3)
        stop.verified("bad", 3, 0)
        stop.begin(["good", "bad"], np.array([8, 8]))
    on = stop.goes_on(0, np.array([0, 1]), np.array([0.8, 0.8], np.float32))
    assert on.tolist() == [True, False]
    assert stop.goes_on(0, np.array([1]), np.array([0.8], np.float32)).tolist() == [False]
    stop.forget("bad")
    stop.begin(["bad"], np.array([8]))
    assert stop.goes_on(0, np.array([0]), np.array([0.8], np.float32)).tolist() == [True]


def test_a_worked_round_of_a_request():
    stop = make_stop(AdaptiveConfidenceStop(rule="adaptive_confidence", acceptance=0.9))
    stop.begin(["r"], np.array([8]))
    stop.verified("r", 8, 4)  # acceptance 0.9 -> 0.7: below what is aimed at
    stop.begin(["r"], np.array([8]))
    edge = np.array([0.8009, 0.8011], np.float32)
    both = np.array([0, 0])
    assert stop.goes_on(0, both, edge).tolist() == [False, True]


def test_a_rejection_becomes_probable():
    """SpecDec++'s worked values: 0.9, 0.9, 0.5 behind the second to fourth token, h = 0.3."""
    rates = iter([0.9, 0.9, 0.5])
    stop = make_stop(
        AcceptanceHeadStop.model_construct(rule="acceptance_head", head="", threshold=0.3),
        rate=lambda: np.array([next(rates)], np.float32),
    )
    assert run(stop, [0.0] * 20) == 4
    # Of several requests, each by itself.
    stop.begin(["a", "b"], np.array([20, 20]))
    both, nothing = np.array([0, 1]), np.zeros(2, np.float32)
    rates = iter([np.array([0.9, 0.5], np.float32), np.array([0.9], np.float32)])
    stop._rate = lambda: next(rates)
    assert stop.goes_on(0, both, nothing).tolist() == [True, True]
    assert stop.goes_on(1, both, nothing).tolist() == [True, False]
    assert stop.goes_on(2, both[:1], nothing[:1]).tolist() == [True]


def test_below_the_middle_of_right_and_wrong_a_draft_ends():
    thresholds = {"known": 0.6, "new": float("nan")}
    stop = make_stop(TauStop(rule="tau"), threshold_of=thresholds.__getitem__)
    stop.begin(["known", "new"], np.array([9, 9]))
    found = stop.goes_on(0, np.array([0, 1]), np.array([0.59, 0.01], np.float32))
    assert found.tolist() == [False, True]
    assert stop.goes_on(1, np.array([0]), np.array([0.6], np.float32)).tolist() == [True]


@pytest.mark.parametrize("blocks", [0, 2])
def test_the_head_is_residual_blocks_and_a_softmax(tmp_path, blocks):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "out.weight": torch.randn(2, 6, generator=generator),
        "out.bias": torch.randn(2, generator=generator),
    }
    for i in range(blocks):
        tensors[f"block.{i}.weight"] = torch.randn(6, 6, generator=generator)
        tensors[f"block.{i}.bias"] = torch.randn(6, generator=generator)
    save_file(tensors, tmp_path / "head.safetensors")
    assert head_size(tmp_path / "head.safetensors") == 6
    hidden = torch.randn(5, 6, generator=generator)
    found = AcceptanceHead(tmp_path / "head.safetensors", torch.device("cpu"))(hidden)
    for row, each in zip(hidden, found.tolist(), strict=True):
        x = row
        for i in range(blocks):
            inner = tensors[f"block.{i}.weight"] @ x + tensors[f"block.{i}.bias"]
            x = x + inner * inner.sigmoid()
        reject, accept = (tensors["out.weight"] @ x + tensors["out.bias"]).exp().tolist()
        assert each == pytest.approx(accept / (accept + reject), rel=1e-4)


def test_what_is_no_head_is_named(tmp_path):
    save_file({"out.weight": torch.zeros(2, 6)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"an acceptance head is 'out\.weight'"):
        AcceptanceHeadStop(rule="acceptance_head", head=str(tmp_path / "head.safetensors"))


# -- losslessness, exactly ------------------------------------------------------------


def chain_law(
    goes_on: Callable[[Text], bool], most: int, siblings: Callable[[int], int] = lambda first: 0,
    drops: Callable[[Text], bool] = lambda text: False, text: Text = (),
) -> dict[Text, Fraction]:  # fmt: skip
    """The law of one step of a drafted chain, judged token by token (rule ``without_replacement``),
    whose draft goes on behind a token if ``goes_on`` says so, with so many ``siblings`` of each,
    drawn behind it. ``drops``: the token is not verified after all, which is wrong."""
    out: dict[Text, Fraction] = defaultdict(Fraction)
    p, q = oracle.p[text], oracle.q[text]

    def ends(weight: Fraction, law: list[Fraction]) -> None:
        for token in range(oracle.V):
            out[(*text, token)] += weight * law[token]

    for first in range(oracle.V):
        if drops((*text, first)):
            ends(q[first], p)
            continue
        accept = min(Fraction(1), p[first] / q[first])
        below = (*text, first)
        if goes_on(below) and len(below) < most:
            inner = chain_law(goes_on, most, siblings, drops, below)
        else:
            inner = {(*below, token): oracle.p[below][token] for token in range(oracle.V)}
        for found, weight in inner.items():
            out[found] += q[first] * accept * weight
        left, law, drawn = q[first] * (1 - accept), oracle.residual(p, q), [first]
        _siblings(out, text, left, law, q, drawn, siblings(first))
    return out


def _siblings(out, text, weight, law, q, drawn, more) -> None:
    """Those behind the first, without replacement, leaves."""
    rest = oracle.norm([Fraction(0) if x in drawn else each for x, each in enumerate(q)])
    if not weight or not more or rest is None:
        for token in range(oracle.V):
            out[(*text, token)] += weight * law[token]
        return
    for token in range(oracle.V):
        if not rest[token]:
            continue
        accept = min(Fraction(1), law[token] / rest[token])
        for behind in range(oracle.V):
            below = oracle.p[(*text, token)][behind]
            out[(*text, token, behind)] += weight * rest[token] * accept * below
        left = weight * rest[token] * (1 - accept)
        _siblings(out, text, left, oracle.residual(law, rest), q, [*drawn, token], more - 1)


def sure(text: Text) -> bool:
    """Did the draft give the last token much?"""
    return oracle.q[text[:-1]][text[-1]] >= Fraction(6, 20)


def test_a_stop_behind_a_token_that_stays_changes_nothing():
    assert oracle.tv(chain_law(sure, most=2)) == 0
    assert oracle.tv(chain_law(lambda text: False, most=2)) == 0


def test_dropping_the_token_that_was_looked_at_is_told():
    wrong = chain_law(sure, most=2, drops=lambda text: len(text) == 1 and not sure(text))
    assert oracle.tv(wrong) > Fraction(1, 100)


def test_siblings_whose_number_the_first_one_decides_change_nothing():
    """The caterpillar's: more of them beside a token that the draft was less sure of."""
    law = chain_law(sure, most=2, siblings=lambda first: 2 if first % 2 else 1)
    assert oracle.tv(law) == 0


def block_law(goes_on: Callable[[Text], bool], most: int) -> dict[Text, Fraction]:
    """The law of block verification of a chain that ends where ``goes_on`` says."""
    out: dict[Text, Fraction] = defaultdict(Fraction)

    def drafts(text: Text, weight: Fraction):
        for token in range(oracle.V):
            below, w = (*text, token), weight * oracle.q[text][token]
            if len(below) < most and goes_on(below):
                yield from drafts(below, w)
            else:
                yield below, w

    for text, weight in drafts((), Fraction(1)):
        ratios = [Fraction(1)]
        for i, token in enumerate(text):
            here = text[:i]
            ratio = oracle.p[here][token] / oracle.q[here][token]
            ratios.append(min(ratios[-1] * ratio, Fraction(1)))
        reach = weight
        for i in range(len(text), -1, -1):
            here = text[:i]
            law = oracle.p[here]
            if i < len(text):
                pairs = zip(oracle.p[here], oracle.q[here], strict=True)
                law = [max(ratios[i] * a - b, Fraction(0)) for a, b in pairs]
            left = sum(law)
            accept = ratios[i]
            if i == 0:
                accept = Fraction(1)
            elif i < len(text):
                accept = left / (left + 1 - ratios[i]) if left + 1 - ratios[i] else Fraction(1)
            normed = oracle.norm(law) or oracle.p[here]
            for token in range(oracle.V):
                out[(*here, token)] += reach * accept * normed[token]
            reach *= 1 - accept
    return out


def test_block_verification_takes_chains_that_end_by_their_tokens():
    assert oracle.tv(block_law(sure, most=2)) == 0
    assert oracle.tv(block_law(lambda text: True, most=2)) == oracle.tv(oracle.block(2)) == 0
