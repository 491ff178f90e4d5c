"""The verifier without an engine: every strategy on vLLM's own sampler, against what it means."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from tests.samplers.test_relaxed import make_rows
from vllm_specplus.config import parse
from vllm_specplus.engine import verify
from vllm_specplus.engine.verify import Verifier, VerifyBatch, make_verifier
from vllm_specplus.metrics import Counters
from vllm_specplus.step import DraftProbs, Rows

VOCAB = 8
CPU = torch.device("cpu")
#: Of request 0: root 1 with children 3 and 5; below 5 is 2. Request 1 has no draft.
ROWS = make_rows([1, 3, 5, 2, 4], [-1, 0, 0, 2, -1], [0, 4, 5])
#: A codebook in which codes that differ by 1 are neighbours.
CODEBOOK = torch.arange(float(VOCAB))[:, None]


class Group:
    """A rank of two, which hears what rank 0 says."""

    world_size = 2

    def __init__(self, rank: int, heard=None):
        self.rank_in_group, self.heard = rank, heard

    def broadcast_object(self, value, src):
        assert src == 0
        if self.rank_in_group == 0:
            self.heard = value
        return self.heard


def metadata_of(temperature: list[float], generators=None, logprobs=None) -> SamplingMetadata:
    greedy = [t == 0 for t in temperature]
    none = torch.zeros(len(temperature))
    return SamplingMetadata(
        temperature=torch.tensor(temperature), all_greedy=all(greedy), all_random=not any(greedy),
        top_p=None, top_k=None, generators=generators or {}, max_num_logprobs=logprobs,
        no_penalties=True, prompt_token_ids=None, frequency_penalties=none,
        presence_penalties=none, repetition_penalties=none + 1,
        output_token_ids=[[] for _ in temperature], allowed_token_ids_mask=None,
        bad_words_token_ids={}, logitsprocs=LogitsProcessors(),
    )  # fmt: skip


def batch_of(temperature: list[float], rows: Rows = ROWS, stops=frozenset(), **keys) -> VerifyBatch:
    count = len(temperature)
    fields = {
        "request_ids": [f"r{i}" for i in range(count)],
        "rows": rows,
        "metadata": metadata_of(temperature),
        "texts": None,  # nobody asks for a penalty
        "temperature": np.array(temperature, np.float32),
        "top_k": np.full(count, VOCAB, np.int32),
        "top_p": np.ones(count, np.float32),
        "discarded": np.zeros(count, bool),
        "relaxed_stops": [stops] * count,
    }
    return VerifyBatch(**fields | keys)


def made(
    acceptance=None, rule=None, draft_probs=None, counters=None, group=None, **proposer
) -> Verifier:
    keys = {"method": "token_recycling" if rule is None else "jacobi"}
    if acceptance:
        keys |= {"acceptance": acceptance, "allow_lossy": True}
    drafter = {"rule": rule, "top_k": 3, "reads_target_probs": False} | proposer
    return make_verifier(
        parse(keys), SimpleNamespace(**drafter), Sampler("raw_logprobs"), CPU, CODEBOOK,
        counters or Counters(), draft_probs, group,
    )  # fmt: skip


def certain(tokens: list[int], least: float = -50.0) -> torch.Tensor:
    """Logits float32 [L, V] that leave no choice."""
    logits = torch.full((len(tokens), VOCAB), least)
    logits[torch.arange(len(tokens)), tokens] = 0.0
    return logits


def no_draws(request_ids, rows) -> DraftProbs:
    count = len(rows.tokens)
    return DraftProbs(torch.empty(0, 1), np.full(count, -1, np.int32), np.zeros(count, np.int32))


def texts(verdict) -> list[list[int]]:
    kept = verdict.acceptance
    return [row[:n].tolist() for row, n in zip(kept.output, kept.lengths, strict=True)]


@pytest.mark.parametrize("rule", [None, "without_replacement"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_the_target_is_certain_all_ways_say_the_same(rule, temperature):
    """Followed down a branch; a rule judges as deterministic what nothing drew."""
    verifier = made(rule=rule, draft_probs=no_draws)
    verdict = verifier.verify(certain([5, 0, 2, 7, 6]), batch_of([temperature] * 2))
    assert texts(verdict) == [[5, 2, 7], [6]]
    assert verdict.acceptance.path.tolist() == [[0, 2, 3], [0, -1, -1]]
    assert verdict.top_ids.shape == (5, 3)
    assert verdict.top_ids[:, 0].tolist() == [5, 0, 2, 7, 6]
    assert verdict.logprobs is None
    assert verdict.target_probs is None


def test_greedy_steps_ask_neither_the_sampler_nor_the_draft():
    def fails(*args):
        raise AssertionError

    verifier = made(rule="without_replacement", draft_probs=fails)
    verdict = verifier.verify(certain([3, 1, 0, 0, 2]), batch_of([0.0, 0.0]))
    assert texts(verdict) == [[3, 1], [2]]
    with pytest.raises(AssertionError):
        verifier.verify(certain([3, 1, 0, 0, 2]), batch_of([0.0, 1.0]))


@pytest.mark.parametrize("rule", [None, "without_replacement", "traversal"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_distribution_breaks_its_request_alone(rule, temperature, value):
    """Never with an id that does not exist; a node in question is not accepted, so that its row is
    the next step's root."""
    verifier = made(rule=rule, draft_probs=no_draws)
    logits = certain([5, 0, 2, 7, 6])
    logits[2, 1] = value
    verdict = verifier.verify(logits, batch_of([temperature] * 2))
    assert not verdict.broken.any()
    assert texts(verdict) == [[5], [6]]
    logits = certain([5, 0, 2, 7, 6])
    logits[0, 1] = value
    verdict = verifier.verify(logits, batch_of([temperature] * 2))
    assert verdict.broken.tolist() == [True, False]
    assert texts(verdict) == [[0], [6]]
    assert verdict.top_ids.min() >= 0
    assert verdict.top_ids.max() < VOCAB
    logits = certain([5, 0, 2, 7, 6])
    logits[1] = value  # off the path
    assert not verifier.verify(logits, batch_of([temperature] * 2)).broken.any()
    logits = certain([5, 0, 2, 7, 6])
    logits[4] = value  # of a prompt that is not read to its end
    discarded = np.array([False, True])
    batch = batch_of([temperature] * 2, discarded=discarded)
    assert not verifier.verify(logits, batch).broken.any()


@pytest.mark.parametrize(("rule", "broken"), [(None, False), ("without_replacement", True)])
def test_where_sampling_leaves_nothing_no_id_beyond_the_vocabulary_is_drawn(rule, broken):
    """As after a penalty that divides by next to nothing. vLLM's own draw takes the first id."""
    batch = batch_of([1.0, 1.0])
    batch.metadata.allowed_token_ids_mask = torch.tensor([[True], [False]]).expand(2, VOCAB)
    verdict = made(rule=rule, draft_probs=no_draws).verify(certain([5, 0, 2, 7, 6]), batch)
    assert texts(verdict) == [[0], [6]]
    assert verdict.broken.tolist() == [broken, False]


def test_one_draw_per_row_follows_the_target():
    """1,200 requests of one tree: first tokens as the target says, whatever was drafted."""
    count = 1200
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05] + [0.0] * (VOCAB - 4)).log()
    rows = make_rows([7, 0, 1] * count, [-1, 0, 0] * count, range(0, 3 * count + 1, 3))
    torch.manual_seed(0)
    batch = batch_of([1.0] * count, rows)
    first = made().verify(logits.repeat(3 * count, 1), batch).acceptance
    share = np.bincount(first.output[:, 0], minlength=4) / count
    np.testing.assert_allclose(share, [0.5, 0.3, 0.15, 0.05], atol=0.05)
    assert (first.lengths == 1 + (first.output[:, 0] < 2)).all()


@pytest.mark.parametrize("rule", ["without_replacement", "traversal"])
def test_drawn_drafts_are_judged_by_what_they_were_drawn_from(rule):
    """A draft certain of a token that the target half believes: taken half the time, and else
    never output. A negative control says that nothing drew it, which is as good a proof here, and
    that something else did, which is not."""
    count = 1200
    p = torch.tensor([0.5, 0.3, 0.2] + [0.0] * (VOCAB - 3))
    rows = make_rows([7, 0] * count, [-1, 0] * count, range(0, 2 * count + 1, 2))
    index, drawn = np.tile([0, -1], count), np.tile(np.array([1, 0], np.int32), count)
    shares = {}
    for name, q in {"right": [1.0, 0.0, 0.0], "wrong": [0.5, 0.5, 0.0]}.items():
        found = DraftProbs(torch.tensor([q]), index, drawn)
        verifier = made(
            rule=rule, draft_probs=lambda ids, rows, found=found: found, reads_target_probs=True
        )
        verdict = verifier.verify(p.log().repeat(2 * count, 1), batch_of([1.0] * count, rows))
        first = verdict.acceptance.output[:, 0]
        shares[name] = np.bincount(first, minlength=3) / count
        torch.testing.assert_close(verdict.target_probs, p.repeat(2 * count, 1))
    np.testing.assert_allclose(shares["right"], p[:3], atol=0.05)
    assert np.abs(shares["wrong"] - p[:3].numpy()).max() > 0.2


def test_a_seed_fixes_the_text_and_counts_its_draws():
    """The generator of a seeded request moves by the tokens that were output, and not at all
    where the output is discarded."""
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(1))

    def run(discarded: bool, rows: Rows = ROWS, logits=logits):
        generator = torch.Generator().manual_seed(9)
        batch = batch_of(
            [1.0, 1.0], rows, metadata=metadata_of([1.0, 1.0], {0: generator}),
            discarded=np.array([discarded, False]),
        )  # fmt: skip
        return texts(made().verify(logits.clone(), batch))[0], generator.get_state()

    text, state = run(False)
    scout = torch.Generator().manual_seed(9)
    for _ in text:
        torch.randint(0, 2**31, (1,), generator=scout, dtype=torch.long)
    assert state.equal(scout.get_state())
    _, untouched = run(True)
    assert untouched.equal(torch.Generator().manual_seed(9).get_state())
    # Without a draft the same first token.
    alone = make_rows([1, 4], [-1, -1], [0, 1, 2])
    assert run(False, alone, logits[[0, 4]])[0] == text[:1]


def test_logprobs_are_those_of_the_path():
    verifier = made(draft_probs=no_draws)
    batch = batch_of([1.0, 1.0], metadata=metadata_of([1.0, 1.0], logprobs=2))
    logits = certain([5, 0, 2, 7, 6], least=-20.0)
    verdict = verifier.verify(logits.clone(), batch)
    width = verdict.acceptance.path.shape[1]
    ids = verdict.logprobs.logprob_token_ids.view(2, width, -1)
    assert ids[0, :, 0].tolist() == [5, 2, 7]
    assert ids[1, 0, 0] == 6
    expected = logits.log_softmax(-1)[[0, 2, 3], [5, 2, 7]]
    torch.testing.assert_close(verdict.logprobs.logprobs.view(2, width, -1)[0, :, 0], expected)


def test_accepted_nodes_take_the_place_of_draws():
    """By a rule that takes what is likely enough; not for requests that must be lossless, nor
    beyond their top-k, nor past a stop token."""
    acceptance = {"rule": "typical", "epsilon": 0.05, "delta": 0.9}
    # At the root 0 is best, and 5 has enough.
    logits = torch.log(torch.full((5, VOCAB), 1e-6))
    logits[0, 0], logits[0, 5] = np.log(0.7), np.log(0.29)
    logits[2, 2] = logits[3, 7] = logits[4, 6] = 0.0
    for keys, text, count in (
        ({}, [5, 2, 7], 1),
        ({"relaxed_stops": [None, None]}, [0], 0),
        ({"stops": frozenset({0})}, [0], 0),
        ({"stops": frozenset({5})}, [0], 0),
        ({"top_k": np.array([1, 1], np.int32)}, [0], 0),
        ({"top_p": np.array([0.6, 1], np.float32)}, [0], 0),
    ):
        counters = Counters()
        verifier = made(acceptance, counters=counters)
        assert not verifier.reads_hidden
        verdict = verifier.verify(logits.clone(), batch_of([0.0, 0.0], **keys))
        assert texts(verdict) == [text, [6]]
        assert counters["relaxed_tokens"] == count


def test_a_judge_wants_hidden_states(tmp_path):
    from safetensors.torch import save_file

    weight = torch.full((VOCAB,), 4.0)
    weight[3] = -4.0  # node 3 is wrong, all others are right
    save_file({"weight": weight, "bias": torch.zeros(1)}, tmp_path / "head")
    verifier = made({"rule": "judge", "head": str(tmp_path / "head")})
    assert verifier.reads_hidden
    hidden = torch.eye(VOCAB)[torch.from_numpy(ROWS.tokens).long()]
    verdict = verifier.verify(
        certain([0, 0, 0, 7, 6], least=-2.0), batch_of([0.0, 0.0], hidden=hidden)
    )
    assert texts(verdict) == [[5, 2, 7], [6]]
    # Of a target that hands no states out, it accepts nothing.
    counters = Counters()
    verifier = made({"rule": "judge", "head": str(tmp_path / "head")}, counters=counters)
    verdict = verifier.verify(certain([0, 0, 0, 7, 6], least=-2.0), batch_of([0.0, 0.0]))
    assert counters["relaxed_tokens"] == 0
    assert texts(verdict)[0][0] == 0


def test_relaxed_sampling_spares_greedy_requests_and_words():
    """Everything is lent: all drafts are accepted, but where the rule has no say."""
    acceptance = {"rule": "lantern", "k": VOCAB, "delta": 1.0}
    logits = torch.log(torch.full((5, VOCAB), 1e-3))
    logits[:, 6] = 0.0
    for keys, temperature, accepted in (
        ({}, 1.0, True),
        ({"relaxed_stops": [None, None]}, 1.0, False),
        ({"outside_pictures": np.array([True, False])}, 1.0, False),
        ({"outside_pictures": np.array([False, True])}, 1.0, True),
        ({}, 0.0, False),
    ):
        counters = Counters()
        # Without draws: tokens are compared all the same.
        verifier = made(acceptance, draft_probs=no_draws, counters=counters)
        torch.manual_seed(0)
        batch = batch_of([temperature, 1.0], **keys)
        lengths = verifier.verify(logits.clone(), batch).acceptance.lengths
        assert (lengths[0] > 1) == accepted
        assert (counters["relaxed_tokens"] > 0) == accepted


def test_rank_0_judges_for_all():
    first, second = Group(0), Group(1)
    logits = torch.randn(5, VOCAB)
    verifier = made(
        rule="without_replacement", draft_probs=no_draws, group=first, reads_target_probs=True
    )
    verdict = verifier.verify(logits.clone(), batch_of([1.0, 1.0]))
    second.heard = first.heard
    other = made(rule="without_replacement", group=second).verify(logits, batch_of([1.0, 1.0]))
    assert other.acceptance.output.tolist() == verdict.acceptance.output.tolist()
    assert verdict.target_probs is not None
    assert other.target_probs is None


def test_nothing_is_compiled_on_a_cpu():
    made().warm_up(VOCAB)
    made(rule="traversal").warm_up(VOCAB)


def test_the_vocabulary_is_ranked_only_for_who_reads_it(monkeypatch):
    asked = []
    top = verify.most_probable
    monkeypatch.setattr(
        verify, "most_probable", lambda logits, k: asked.append(k) or top(logits, k)
    )
    for top_k in (0, 3):
        verifier = made(top_k=top_k)
        for temperature in (0.0, 1.0):
            verdict = verifier.verify(certain([5, 2, 2, 6, 7]), batch_of([temperature] * 2))
            assert verdict.acceptance.output[0].tolist()[:3] == [5, 2, 6]
            assert verdict.top_ids.shape == (5, asked[-1])
    assert asked == [1, 0, 3, 3]


def test_of_a_step_that_nobody_watches_no_more_is_found_than_its_tokens():
    rows = make_rows([1, 3, 4], [-1] * 3, [0, 1, 2, 3])
    verifier, logits = made(), certain([5, 0, 2])
    for temperature, found in ((0.0, 1), (1.0, 0)):
        batch = batch_of([temperature] * 3, rows=rows)
        verdict = verifier.verify(logits.clone(), batch, watched=False)
        assert texts(verdict) == [[5], [0], [2]]
        assert verdict.top_ids.shape == (3, found)
    logits[1, 3] = float("nan")
    verdict = verifier.verify(logits, batch_of([0.0] * 3, rows=rows), watched=False)
    assert verdict.broken.tolist() == [False, True, False]


@pytest.mark.parametrize("mixed", [False, True])
def test_greedy_requests_are_relaxed_if_they_are_asked_to_be(mixed):
    """Codes that differ by 1 lend: 3 stands for 4, and below it 2 for 1, but 5 for nothing. In a
    batch with sampled requests, too, whose rows off the lossless path hold no draw."""
    acceptance = {"rule": "lantern", "k": 2, "delta": 0.4, "greedy": True}
    counters = Counters()
    verifier = made(acceptance, "without_replacement", no_draws, counters)
    rows = make_rows([1, 3, 5, 2, 4], [-1, 0, 0, 1, -1], [0, 4, 5])
    p = torch.full((5, VOCAB), 1e-4)
    p[0, 4], p[0, 3], p[0, 2] = 0.45, 0.25, 0.24  # 4 is beyond the bound for 3 and 5, 2 is not
    p[1, 1], p[1, 2], p[1, 3] = 0.35, 0.3, 0.3
    p[2:, 6] = 1.0
    temperatures = [0.0, 1.0 if mixed else 0.0]
    verdict = verifier.verify(p.log(), batch_of(temperatures, rows))
    assert texts(verdict) == [[3, 2, 6], [6]]
    assert counters.as_dict()["relaxed_tokens"] == 2
    strict = made({"rule": "lantern", "k": 2, "delta": 0.4}, "without_replacement", no_draws)
    assert texts(strict.verify(p.log(), batch_of(temperatures, rows)))[0] == [4]
    lossless = batch_of(temperatures, rows, stops=None)
    assert texts(verifier.verify(p.log(), lossless))[0] == [4]
    stopping = batch_of(temperatures, rows, stops=frozenset({3}))
    assert texts(verifier.verify(p.log(), stopping))[0] == [4]
