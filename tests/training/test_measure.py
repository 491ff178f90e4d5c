"""Acceptance on held-out texts: intervals, depths, and chains as a draft would propose them."""

from __future__ import annotations

import json

import pytest
import torch

from tests.training.tiny import CPU, batch_of, save_target, some_texts
from vllm_specplus.training.decoding import greedy_chains
from vllm_specplus.training.frozen import Frozen
from vllm_specplus.training.language_model import LanguageModel
from vllm_specplus.training.measure import Measured, Tally, measure
from vllm_specplus.training.probe import Probe, wilson
from vllm_specplus.training.slices import slices
from vllm_specplus.training.texts import Text


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Frozen:
    return Frozen.load(save_target(tmp_path_factory.mktemp("target")), CPU, torch.float32)


def naive_chain(model: LanguageModel, text: list[int], depth: int) -> list[int]:
    """By reading everything again for every token."""
    text = list(text)
    for _ in range(depth):
        with torch.no_grad():
            text.append(int(model.output(model.read(torch.tensor([text]))[0, -1]).argmax()))
    return text[-depth:]


def own_pairs(target: Frozen, draft: LanguageModel):
    @torch.no_grad()
    def pairs(batch):
        known = target.states(batch).last[batch.learn]
        drafted = draft.read(batch.tokens, batch.mask)[batch.learn]
        for here in slices(len(known)):
            yield target.output(known[here]), draft.output(drafted[here])

    return pairs


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0),
     (500, 1000, 0.4691, 0.5309)],
)  # fmt: skip
def test_wilsons_interval(right, count, low, high):
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


def test_chains_are_those_of_reading_everything_again(target):
    """Of texts of different lengths, several places in one of them, whatever stands behind."""
    texts = some_texts(3)
    batch = batch_of(texts)
    rows, places = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([23, 5, 0, 25, 11])
    for model in (target, target.after(1)):
        chains = greedy_chains(model, batch.tokens, batch.mask, rows, places, 5)
        for row, place, chain in zip(rows.tolist(), places.tolist(), chains.tolist(), strict=True):
            before = list(texts[row].tokens[: place + 1])
            assert chain == naive_chain(model, before, 5)
    assert not greedy_chains(target, *batch_args(batch, rows, places), 5).equal(chains)


def batch_args(batch, rows, places) -> tuple:
    return batch.tokens, batch.mask, rows, places


def test_a_probe_lies_where_a_model_wrote(target):
    texts = some_texts(5, start=7)
    probe = Probe.of(target, (), texts, depth=3, positions=40)
    assert probe.truth.shape == (40, 3)
    assert probe.depth == 3
    seen = set()
    for group in probe.groups:
        for row, place in zip(group.rows.tolist(), group.places.tolist(), strict=True):
            length = int(group.mask[row].sum())
            assert 6 <= place < length - 1
            seen.add((tuple(group.tokens[row, :length].tolist()), place))
    assert len(seen) == 40
    again = Probe.of(target, (), texts, depth=3, positions=40)
    assert again.truth.equal(probe.truth)
    everywhere = Probe.of(target, (), texts, depth=1, positions=10_000)
    assert len(everywhere.truth) == sum(len(text.tokens) - 7 for text in texts)


def test_nothing_is_counted_behind_the_end_of_a_text(target):
    texts = some_texts(5)
    free = Probe.of(target, (), texts, depth=4).truth
    end = int(free.mode().values.mode().values)
    truth = Probe.of(target, (end,), texts, depth=4).truth
    for ours, theirs in zip(truth.tolist(), free.tolist(), strict=True):
        upto = theirs.index(end) + 1 if end in theirs else 4
        assert ours == theirs[:upto] + [-1] * (4 - upto)
    assert (truth == -1).any()


def test_rates_by_depth_by_hand():
    truth = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, -1], [1, 1, 1]])
    paths = torch.tensor([
        [[1, 2, 9], [1, 3, 3]],     # right to depth 2
        [[4, 9, 6], [4, 5, -1]],    # the second path, to depth 2, where it ends
        [[7, 8, -1], [7, 8, 9]],    # all that the target wrote
        [[2, 1, 1], [-1, -1, -1]],  # wrong at once: what follows does not count
    ])  # fmt: skip
    found = Probe((), truth).by_depth(paths)
    assert [(each.depth, each.count, each.rate) for each in found] == [
        (1, 4, 0.75), (2, 4, 0.75), (3, 3, 0.0),
    ]  # fmt: skip
    assert (found[0].low, found[0].high) == wilson(3, 4)
    first = Probe((), truth).by_depth(paths[:, :1])
    assert [each.rate for each in first] == [0.75, 0.5, 0.0]


def test_depths_that_no_text_reaches_are_left_out():
    truth = torch.tensor([[1, -1], [2, -1]])
    assert [each.depth for each in Probe((), truth).by_depth(truth[:, None])] == [1]


def test_a_tally_by_hand():
    tally = Tally()
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])
    tally.add(p.log(), q.log())
    assert (tally.count, tally.tvd, tally.greedy) == (1, pytest.approx(0.7), 0.0)
    tally.add(torch.cat((p, p)).log(), torch.cat((p, p)).log())
    assert (tally.count, tally.tvd) == (3, pytest.approx(2.7 / 3))
    assert tally.greedy == pytest.approx(2 / 3)


def test_the_target_itself_is_always_accepted(target):
    found = measure(target, some_texts(6), own_pairs(target, target), lambda p: p.chains(target))
    assert found.positions == sum(len(text.tokens) - 4 for text in some_texts(6))
    assert found.tvd_acceptance == pytest.approx(1, abs=1e-5)
    assert found.greedy_acceptance == 1
    assert [each.rate for each in found.by_depth] == [1] * 6
    assert all(each.low < 0.99 < each.high for each in found.by_depth)


def test_another_model_is_not(target):
    """At every depth the rate is what a naive comparison of greedy texts gives."""
    draft, texts = target.after(2), some_texts(4)
    found = measure(target, texts, own_pairs(target, draft), lambda probe: probe.chains(draft))
    assert found.tvd_acceptance < 0.9
    right = dict.fromkeys(range(1, 7), 0)
    count = 0
    for text in texts:
        for place in range(text.start - 1, len(text.tokens) - 1):
            before = list(text.tokens[: place + 1])
            pair = zip(naive_chain(target, before, 6), naive_chain(draft, before, 6), strict=True)
            count += 1
            for depth, (a, b) in enumerate(pair, 1):
                if a != b:
                    break
                right[depth] += 1
    assert 0 < right[1] < count
    assert [each.rate for each in found.by_depth] == [right[d] / count for d in range(1, 7)]
    assert found.greedy_acceptance == pytest.approx(right[1] / count)


def test_what_is_measured_is_an_object_of_json(target):
    texts = [Text("a", (1, 2, 3, 4), 1, "target")]
    found = measure(target, texts, own_pairs(target, target), lambda probe: probe.chains(target))
    back = json.loads(json.dumps(found.to_json()))
    assert back["positions"] == 3
    assert back["by_depth"][0].keys() == {"depth", "count", "rate", "low", "high"}
    empty = Measured(0, None, None, ()).to_json()
    assert json.loads(json.dumps(empty))["tvd_acceptance"] is None
