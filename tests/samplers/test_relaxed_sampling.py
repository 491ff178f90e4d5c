"""Relaxed speculative sampling: the papers' examples, bounds, and the lossless limit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_specplus.config import parse
from vllm_specplus.plugin import worker_config
from vllm_specplus.samplers import chains, relaxed_sampling
from vllm_specplus.samplers.probabilities import Probabilities
from vllm_specplus.samplers.registry import make_rule
from vllm_specplus.samplers.relaxed_sampling import Closeness, Relaxation, neighbours
from vllm_specplus.samplers.sampled import WithoutReplacement
from vllm_specplus.step import DraftProbs, Rows
from vllm_specplus.target import Target

# Codes on a line, and a p and q that differ most at the first.
LINE = torch.tensor([[0.0], [1.0], [2.1], [4.0], [8.0]])
P = torch.tensor([0.30, 0.25, 0.20, 0.15, 0.10])
Q = torch.tensor([0.70, 0.10, 0.10, 0.05, 0.05])


verify = WithoutReplacement().reference


def rule_of(acceptance: dict, codebook: torch.Tensor = LINE, embeddings=None):
    """``embeddings`` of the codes; None: the codebook."""
    keys = {"method": "jacobi", "acceptance": acceptance, "allow_lossy": True}
    config = parse(keys).acceptance
    given = {
        "codebook": codebook,
        "embeddings": lambda: codebook if embeddings is None else embeddings,
    }
    return make_rule(config.rule, config.model_dump(exclude={"rule"}), **given)


def masses(rule, p, q, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one row ``p`` [V], for every token; ``q`` None: nothing drew them."""
    rows = torch.zeros_like(tokens)
    known = Probabilities(p[None], torch.empty(0, len(p)) if q is None else q[None])
    return rule.masses(known, rows, rows - int(q is None), tokens)


def residual(rule, p, q, token) -> torch.Tensor:
    row = torch.eye(len(p))[token] if q is None else q
    drawn = torch.tensor([q is not None])
    return rule.residual(p[None], row[None], drawn, torch.tensor([token]))[0]


def acceptances(rule, p, q) -> torch.Tensor:
    target_mass, draft_mass = masses(rule, p, q, torch.arange(len(p)))
    return (target_mass / draft_mass).clamp(max=1)


def output_probs(rule, p, q) -> torch.Tensor:
    """Of a chain's one position, exactly: accepted draws, and residuals of rejected ones."""
    f = acceptances(rule, p, q)
    probs = q * f
    for token in range(len(p)):
        rejected = float(q[token] * (1 - f[token]))
        if rejected > 0:
            left = residual(rule, p, q, token)
            probs = probs + rejected * left / left.sum()
    return probs


def tv(a, b) -> float:
    return float((a - b).abs().sum() / 2)


def chain(tokens: list[int]) -> Rows:
    count = len(tokens) + 1
    parents = np.arange(-1, count - 1, dtype=np.int32)
    return Rows(
        np.array([0, *tokens], np.int32), parents, np.array([0, count], np.int32),
        np.arange(count, dtype=np.int32),
    )  # fmt: skip


def test_the_nearest_codes_come_first_and_a_code_is_not_its_own_neighbour():
    assert neighbours(LINE, 9).tolist() == [
        [1, 2, 3, 4], [0, 2, 3, 4], [1, 3, 0, 4], [2, 1, 0, 4], [3, 2, 1, 0],
    ]  # fmt: skip


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(0, 9))
def test_neighbours_are_those_of_a_sort_with_ties_to_the_lower_id(seed, k):
    """Of few places, so that many codes are as near as others."""
    rng = np.random.default_rng(seed)
    codebook = torch.from_numpy(rng.integers(0, 3, (10, 2)).astype(np.float32))
    apart = (codebook[:, None] - codebook).square().sum(-1).tolist()
    expected = [
        sorted((other for other in range(10) if other != code), key=lambda o: (row[o], o))[:k]
        for code, row in enumerate(apart)
    ]
    assert neighbours(codebook, k).tolist() == expected


def test_neighbours_are_looked_for_once(monkeypatch):
    found = []

    def counted(codebook, k):
        found.append(k)
        return neighbours(codebook, k)

    monkeypatch.setattr(relaxed_sampling, "neighbours", counted)
    assert rule_of({"rule": "lantern", "k": 2}).near.shape == (5, 2)
    assert rule_of({"rule": "lantern", "k": 2, "residual": "lumina"}).near.shape == (5, 2)
    assert found == [2, 3]


@pytest.mark.parametrize("most", [0.5, 3.0, 40.0])
def test_closeness_is_a_distance_below_the_given_one(most):
    vectors = torch.from_numpy(np.random.default_rng(3).normal(size=(21, 4)))
    close = Closeness(vectors, most)
    expected = (vectors[:, None] - vectors).square().sum(-1) < most
    codes = torch.arange(21)
    assert close(codes[:, None], codes).equal(expected)
    assert close(torch.tensor(20), codes).equal(close(torch.tensor(30), codes))


@pytest.mark.parametrize(
    ("acceptance", "f0", "rate", "probs", "distance"),
    [
        ({"rule": "lantern", "k": 0}, 0.4286, 0.60, [0.30, 0.25, 0.20, 0.15, 0.10], 0.0),
        (
            {"rule": "lantern", "k": 1, "delta": 0.3},
            0.7857, 0.85, [0.55, 0.1562, 0.1375, 0.0875, 0.0687], 0.25,
        ),
        (
            {"rule": "lantern++", "k": 2, "lambda": 1.9},
            0.7857, 0.85, [0.55, 0.1562, 0.1375, 0.0875, 0.0687], 0.25,
        ),
        (
            {"rule": "lantern", "k": 2, "delta": 0.45},
            1.0, 1.00, [0.70, 0.10, 0.10, 0.05, 0.05], 0.40,
        ),
        (
            {"rule": "lantern++", "k": 2, "lambda": 1.9, "residual": "lumina"},
            0.7857, 0.85, [0.55, 0.10, 0.10, 0.05, 0.20], 0.35,
        ),
    ],
)  # fmt: skip
def test_vectors_of_the_lantern_card(acceptance, f0, rate, probs, distance):
    rule = rule_of(acceptance)
    f = acceptances(rule, P, Q)
    assert float(f[0]) == pytest.approx(f0, abs=1e-4)
    assert (f[1:] == 1).all()
    assert float((Q * f).sum()) == pytest.approx(rate, abs=1e-6)
    out = output_probs(rule, P, Q)
    assert out.tolist() == pytest.approx(probs, abs=1e-4)
    assert tv(out, P) == pytest.approx(distance, abs=1e-6)


@pytest.mark.parametrize(("variant", "distance"), [("llamagen", 0.45), ("optimal", 0.25)])
def test_a_token_that_nothing_drew(variant, distance):
    """The acceptance is p(x) + S; the reference code leaves (0, 0, 0, .6, .4)."""
    rule = rule_of({"rule": "lantern", "k": 1, "delta": 0.3, "residual": variant})
    target_mass, draft_mass = masses(rule, P, None, torch.tensor([0]))
    assert float(target_mass / draft_mass) == pytest.approx(0.55)
    left = residual(rule, P, None, 0)
    left = left / left.sum()
    if variant == "llamagen":
        assert left.tolist() == pytest.approx([0, 0, 0, 0.6, 0.4])
    assert tv(torch.eye(5)[0] * 0.55 + 0.45 * left, P) == pytest.approx(distance)


@pytest.mark.parametrize(
    ("group", "rate", "distance"), [(2, 0.596, 0.053), (4, 0.713, 0.070), (6, 0.851, 0.205)]
)
def test_vectors_of_the_gsd_card(group, rate, distance):
    """Windows of w below and w - 1 above, no filters; a window of 1 accepts less than plain."""
    p = torch.tensor([0.02, 0.05, 0.08, 0.15, 0.30, 0.40])
    q = torch.tensor([0.05, 0.10, 0.20, 0.30, 0.25, 0.10])
    rule = rule_of({"rule": "gsd", "group": group, "max_gap": 1.0}, torch.zeros(6, 1))
    f = acceptances(rule, p, q)
    assert float((q * f).sum()) == pytest.approx(rate, abs=1e-3)
    plain = rule_of({"rule": "gsd", "group": 1}, torch.zeros(6, 1))
    assert float((q * acceptances(plain, p, q)).sum()) == pytest.approx(0.65)
    # The card's figures are for the residual (p - q)+, ours is the optimal one.
    left = (p - q).clamp(min=0)
    assert tv(q * f + (1 - (q * f).sum()) * left / left.sum(), p) == pytest.approx(
        distance, abs=1e-3
    )
    assert tv(output_probs(rule, p, q), p) <= distance + 1e-3
    published = {"rule": "gsd", "group": group, "max_gap": 1.0, "residual": "published"}
    published_rule = rule_of(published, torch.zeros(6, 1))
    assert tv(output_probs(published_rule, p, q), p) == pytest.approx(distance, abs=1e-3)


def test_what_top_k_cut_off_joins_no_group():
    p = torch.tensor([0.0, 0.0, 0.5, 0.5])
    q = torch.tensor([0.4, 0.4, 0.1, 0.1])
    rule = rule_of({"rule": "gsd", "group": 3, "max_gap": 1.0}, torch.zeros(4, 1))
    target_mass, draft_mass = masses(rule, p, q, torch.tensor([2, 3]))
    assert target_mass.tolist() == pytest.approx([1.0, 1.0])
    assert draft_mass.tolist() == pytest.approx([0.2, 0.2])


def test_a_distant_code_joins_no_group():
    p = torch.tensor([0.3, 0.33, 0.37])
    far = torch.tensor([[0.0], [5.0], [0.1]])
    rule = rule_of({"rule": "gsd", "group": 5, "max_gap": 1.0, "max_distance": 1.0}, far)
    target_mass, _ = masses(rule, p, p, torch.arange(3))
    assert target_mass.tolist() == pytest.approx([0.67, 0.33, 0.67])


def test_codes_are_compared_by_what_the_model_reads_or_by_what_is_decoded():
    p = torch.tensor([0.3, 0.33, 0.37])
    decoded, read = torch.tensor([[0.0], [5.0], [0.1]]), torch.tensor([[0.0], [0.1], [5.0]])
    keys = {"rule": "gsd", "group": 5, "max_gap": 1.0, "max_distance": 1.0}
    for vectors, expected in (("codebook", [0.67, 0.33, 0.67]), ("embeddings", [0.63, 0.63, 0.37])):
        rule = rule_of(keys | {"vectors": vectors}, decoded, read)
        assert masses(rule, p, p, torch.arange(3))[0].tolist() == pytest.approx(expected)


def test_a_token_without_probability_has_no_group():
    p = torch.tensor([0.0, 0.5, 0.5])
    rule = rule_of({"rule": "gsd", "group": 3, "max_gap": 1.0}, torch.zeros(3, 1))
    assert masses(rule, p, p, torch.tensor([0, 1]))[0].tolist() == [0.0, 1.0]
    left = residual(rule, p, torch.tensor([0.9, 0.1, 0.0]), 0)
    assert left[0] == 0


@pytest.mark.parametrize("acceptance", [
    {"rule": "gsd", "group": 5, "max_gap": 0.4},
    {"rule": "gsd", "group": 4, "max_gap": 1.0, "max_distance": 2.0},
], ids=str)  # fmt: skip
def test_what_gsd_leaves_is_p_less_what_is_accepted(acceptance):
    """``(p - q f)+``, token by token by the reference; ties and tokens of no probability among
    them."""
    rng = np.random.default_rng(4)
    codebook = torch.from_numpy(rng.normal(size=(12, 3)).astype(np.float32))
    rule = rule_of(acceptance, codebook)
    for _ in range(20):
        p = torch.from_numpy(rng.integers(0, 4, 12).astype(np.float32))
        p, q = p / p.sum(), torch.from_numpy(rng.dirichlet(np.ones(12)).astype(np.float32))
        expected = torch.zeros(12)
        for token in torch.nonzero(p)[:, 0].tolist():
            target_mass, draft_mass = rule.reference(p.tolist(), q.tolist(), token)
            f = min(1.0, target_mass / draft_mass)
            expected[token] = max(float(p[token] - q[token] * f), 0.0)
        assert torch.allclose(residual(rule, p, q, 0), expected, atol=1e-6)


def test_the_judge_accepts_only_where_both_are_alike_and_open():
    rule = rule_of({"rule": "kl_judge", "threshold": 0.2, "sure": 0.6})
    near = torch.tensor([0.30, 0.30, 0.20, 0.10, 0.10])
    assert (acceptances(rule, P, near) == 1).all()
    assert (acceptances(rule, P, Q) < 1).any()  # KL(P || Q) = 0.39
    sure = torch.tensor([0.7, 0.1, 0.1, 0.05, 0.05])
    assert (acceptances(rule, sure, torch.tensor([0.65, 0.15, 0.1, 0.05, 0.05])) < 1).any()


def random_probs(seed: int, size: int, count: int) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).dirichlet(np.full(size, 0.3), count).astype(np.float32)
    )


LOSSLESS = [
    {"rule": "lantern", "k": 0},
    {"rule": "lantern", "k": 5, "delta": 0.0},
    {"rule": "lantern++", "k": 5, "lambda": 1.0},
    {"rule": "gsd", "group": 1},
]


@pytest.mark.parametrize("acceptance", LOSSLESS)
@settings(deadline=None)
@given(seed=st.integers(0, 10**6), drawn=st.booleans())
def test_the_lossless_limit_is_the_lossless_rule_bit_for_bit(acceptance, seed, drawn):
    """The same uniforms give the same tokens, for drawn and for other drafts."""
    rng = np.random.default_rng(seed)
    p, q = random_probs(seed, 12, 5), random_probs(seed + 1, 12, 4)
    tokens = [int(rng.choice(12, p=row / row.sum())) for row in q.double().numpy()]
    rows = chain(tokens)
    index = np.full(5, -1, np.int32)
    counts = np.zeros(5, np.int32)
    if drawn:
        index[:4], counts[:4] = range(4), 1
    noise = torch.from_numpy(rng.random(5, np.float32)), torch.from_numpy(rng.random(1, np.float32))
    draft = DraftProbs(q, index, counts)
    plain = verify(p, rows, draft, *noise)
    codebook = torch.from_numpy(rng.normal(size=(12, 3)).astype(np.float32))
    relaxation = Relaxation(rule_of(acceptance, codebook), [frozenset()])
    assert verify(p, rows, draft, *noise, relaxation).equal(plain)
    assert relaxation.relaxed == 0


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_acceptance_grows_with_every_knob_of_lantern(seed):
    p, q = random_probs(seed, 12, 2)
    codebook = torch.from_numpy(np.random.default_rng(seed).normal(size=(12, 3)))
    for knobs in (
        [{"rule": "lantern", "k": k, "delta": 0.3} for k in (0, 2, 5, 11)],
        [{"rule": "lantern", "k": 11, "delta": d} for d in (0.0, 0.1, 0.3, 1.0)],
        [{"rule": "lantern++", "k": 11, "lambda": x} for x in (1.0, 1.5, 3.0, 10.0)],
    ):
        f = [acceptances(rule_of(knob, codebook), p, q) for knob in knobs]
        for less, more in pairwise(f):
            assert (more >= less).all()


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), delta=st.sampled_from([0.05, 0.2, 0.5]))
def test_the_output_moves_by_no_more_than_was_lent(seed, delta):
    """Total variation, exactly; lantern++ also keeps f below lambda p / q."""
    p, q = random_probs(seed, 12, 2)
    codebook = torch.from_numpy(np.random.default_rng(seed).normal(size=(12, 3)))
    rule = rule_of({"rule": "lantern", "k": 11, "delta": delta}, codebook)
    lent = masses(rule, p, q, torch.arange(12))[0] - p
    assert float(lent.max()) <= delta + 1e-6
    assert tv(output_probs(rule, p, q), p) <= float((q > 0).float() @ lent) + 1e-5
    # All of q on one token: by what that one borrowed.
    for token in range(12):
        sure = torch.eye(12)[token]
        assert tv(output_probs(rule, p, sure), p) <= float(lent[token]) + 1e-5
    plus = rule_of({"rule": "lantern++", "k": 11, "lambda": 2.0}, codebook)
    assert (masses(plus, p, q, torch.arange(12))[0] <= 2.0 * p + 1e-6).all()


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_what_stands_for_the_most_probable_code_has_its_mass(seed):
    """As the reference adds them up; without a loan it is the argmax alone."""
    p, _ = random_probs(seed, 12, 2)
    codebook = torch.from_numpy(np.random.default_rng(seed).normal(size=(12, 3)))
    tokens, rows = torch.arange(12), torch.zeros(12, dtype=torch.long)
    for knob in ({"rule": "lantern", "k": 5, "delta": 0.3}, {"rule": "lantern++", "lambda": 3.0}):
        rule = rule_of(knob | {"greedy": True}, codebook)
        found = rule.most_probable(p[None], rows, tokens).tolist()
        want = [rule.reference(p.tolist(), None, token)[0] >= float(p.max()) for token in range(12)]
        assert found == want
    strict = rule_of({"rule": "lantern", "k": 0, "greedy": True}, codebook)
    assert strict.most_probable(p[None], rows, tokens).nonzero().tolist() == [[int(p.argmax())]]


def test_stop_tokens_and_strict_requests_are_verified_losslessly():
    """What the rule would accept at once is left to the lossless test."""
    p = torch.tensor([[0.45, 0.45, 0.09, 0.01]] * 2)
    q = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    rows, draft = chain([3]), DraftProbs(q, np.array([0, -1]), np.array([1, 0], np.int32))
    noise = torch.tensor([0.5, 0.5]), torch.tensor([0.2])
    rule = rule_of({"rule": "lantern", "k": 3, "delta": 1.0}, torch.arange(4.0)[:, None])
    for stops, first in ((frozenset(), 3), (frozenset({3}), 0), (None, 0)):
        relaxation = Relaxation(rule, [stops])
        out = verify(p, rows, draft, *noise, relaxation)
        assert int(out[0]) == first
        assert relaxation.relaxed == (first == 3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"method": "token_recycling", "acceptance": {"rule": "kl_judge"}, "allow_lossy": True},
            "compares with what the nodes were drawn from",
        ),
        (
            {"method": "jacobi", "acceptance": {"rule": "kl_judge"}},
            "acceptance rule 'kl_judge' changes what is answered: set 'allow_lossy'",
        ),
        (
            {"method": "jacobi", "acceptance": {"rule": "typical"}, "allow_lossy": True},
            "takes nodes that were not drawn",
        ),
        (
            {"method": "jacobi", "acceptance": {"rule": "lantern++", "delta": 0.1}},
            "unknown key 'acceptance.delta' (rule 'lantern++' allows: residual, greedy, rule, k, "
            "lambda)",
        ),
        (
            {"method": "jacobi", "acceptance": {"rule": "lantern++", "lambda": 0.5}},
            "'acceptance.lambda' is 0.5: input should be greater than or equal to 1",
        ),
        (
            {"method": "jacobi", "acceptance": {"rule": "gsd", "group": 0}},
            "'acceptance.group' is 0: input should be greater than or equal to 1",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(keys, message):
    with pytest.raises(ValueError, match=r"^speculative_config for ") as error:
        parse(keys)
    assert message in str(error.value)


def test_image_rules_want_an_image_model_and_no_further_word():
    text = Target(lambda: None, 100, "llama", 4, 1, 8)
    picture = Target(lambda: None, 100, "llamagen", 4, 1, 8, has_codebook=True)
    for rule in ("lantern", "lantern++", "gsd"):
        for method in ("jacobi", "token_recycling"):
            config = parse({"method": method, "acceptance": {"rule": rule}})
            assert not config.lossless
            config.check_acceptance(picture)
            with pytest.raises(ValueError, match="goes by the codebook of an image model"):
                config.check_acceptance(text)
    parse({"method": "jacobi"}).check_acceptance(text)


def test_what_travels_to_the_workers_is_read_back():
    """The key lambda is no Python name."""
    config = parse({"method": "jacobi", "acceptance": {"rule": "lantern++", "lambda": 3.0}})
    sent = worker_config(config)["config"]
    assert sent["acceptance"] == {"rule": "lantern++", "lambda": 3.0}
    assert parse(sent) == config


RULES = [
    None,
    *LOSSLESS,
    {"rule": "lantern", "k": 4, "delta": 0.3},
    {"rule": "lantern", "k": 4, "delta": 0.3, "residual": "llamagen"},
    {"rule": "lantern++", "k": 4, "lambda": 2.5, "residual": "lumina"},
    {"rule": "gsd", "group": 5, "max_gap": 0.4},
    {"rule": "gsd", "group": 4, "max_gap": 1.0, "max_distance": 2.0},
    {"rule": "kl_judge", "threshold": 1.5},
]


@pytest.mark.parametrize("acceptance", RULES, ids=str)
@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_all_chains_at_once_equal_one_by_one(acceptance, seed):
    """Several requests: chains of 0 to 5 nodes, drawn ones and others, strict requests, stop
    tokens, a draft of fewer tokens."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 7, int(rng.integers(1, 6)))
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    rows, codes, size = int(starts[-1]), 12, 15  # the last three are labels
    parents = np.concatenate([np.arange(-1, n - 1) for n in counts]).astype(np.int32)
    p, q = random_probs(seed, codes, rows), random_probs(seed + 1, codes - 2, rows)
    p[rng.random((rows, codes)) < 0.2] = 0.0  # cut off by top-k
    p = torch.nn.functional.pad(p, (0, size - codes)) + 0.0
    p[:, 0] += 0.01
    p /= p.sum(-1, keepdim=True)
    tokens = rng.integers(0, size, rows).astype(np.int32)
    index, drawn = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
    for row in np.flatnonzero(parents >= 0):
        if rng.random() < 0.6:
            index[row - 1], drawn[row - 1] = row, 1
            tokens[row] = rng.choice(
                codes - 2, p=q[row].double().numpy() / float(q[row].double().sum())
            )
        if rng.random() < 0.1:  # vLLM's padding
            tokens[row], drawn[row - 1] = -1, 0
    verified = Rows(tokens, parents, starts, parents + 1)
    assert chains.all_chains(verified)
    draft = DraftProbs(q, index, drawn)
    noise = (
        torch.from_numpy(rng.random(rows, np.float32)),
        torch.from_numpy(rng.random(len(counts), np.float32)),
    )
    relaxations = [None, None]
    if acceptance is not None:
        codebook = torch.from_numpy(rng.normal(size=(codes, 3)).astype(np.float32))
        rule = rule_of(acceptance, codebook)
        stops = [(None, frozenset(), frozenset({3, 5}))[i] for i in rng.integers(0, 3, len(counts))]
        relaxations = [Relaxation(rule, stops), Relaxation(rule, stops)]
    slow = verify(p, verified, draft, *noise, relaxations[0])
    fast = chains.verify(p, verified, draft, *noise, relaxations[1])
    assert fast.tolist() == slow.tolist()
    judged = torch.from_numpy(np.flatnonzero(fast.numpy() >= 0))
    assert (p[judged, fast[judged].long()] > 0).all()  # nothing that the target excludes
    if acceptance is not None:
        assert int(relaxations[1].relaxed) == relaxations[0].relaxed


@pytest.mark.parametrize("acceptance", [rule for rule in RULES if rule], ids=str)
@pytest.mark.parametrize("drawn", [True, False])
def test_masses_equal_the_reference(acceptance, drawn):
    """Token by token, in plain Python; ids beyond the codes among them."""
    rng = np.random.default_rng(5)
    codes, size, changed = 12, 14, 0
    for seed in range(20):
        p, q = (
            torch.nn.functional.pad(random_probs(seed + shift, codes, 1)[0], (0, size - codes))
            for shift in (0, 100)
        )
        p[int(rng.integers(codes))] = 0.0
        rule = rule_of(acceptance, torch.from_numpy(rng.normal(size=(codes, 3)).astype(np.float32)))
        q = q if drawn else None
        target_mass, draft_mass = masses(rule, p, q, torch.arange(size))
        expected = [
            rule.reference(p.tolist(), None if q is None else q.tolist(), token)
            for token in range(size)
        ]
        possible = (p > 0).numpy()  # of others nothing is asked
        found = torch.stack((target_mass, draft_mass), 1).numpy()[possible]
        np.testing.assert_allclose(found, np.array(expected)[possible], atol=1e-6)
        changed += (np.abs(found[:, 0] - p.numpy()[possible]) > 1e-6).sum()
    if acceptance not in LOSSLESS and (drawn or acceptance["rule"] != "kl_judge"):
        assert changed > 5


def test_siblings_are_no_chain():
    rows = chain([1, 2])
    rows.parents[2] = 0
    assert not chains.all_chains(rows)


@pytest.mark.parametrize("check", [chains.verify, verify])
def test_padding_is_no_token_and_changes_no_probability(check):
    """Every token of the vocabulary is still drawn as often as the target says."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1]).repeat(8000, 1)
    parents = np.tile(np.array([-1, 0], np.int32), 4000)
    tokens = np.tile(np.array([1, -1], np.int32), 4000)
    rows = Rows(tokens, parents, np.arange(0, 8001, 2, dtype=np.int32), parents + 1)
    none = DraftProbs(torch.empty(0, 1), np.full(8000, -1, np.int32), np.zeros(8000, np.int32))
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(8000, generator=generator), torch.rand(4000, generator=generator)
    out = check(p, rows, none, *noise).view(4000, 2)
    assert (out[:, 1] == -1).all()
    share = out[:, 0].bincount(minlength=4) / 4000
    assert torch.allclose(share, p[0], atol=0.03)
