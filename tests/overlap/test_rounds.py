"""What a draft's process drafts ahead, against a draft that is asked when the text is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.drafting.test_drafting import VOCAB, executor, logits_of, save_draft
from tests.drafting.test_eagle import PAGE, Texts, Vocabulary
from tests.drafting.test_eagle import VOCAB as HEAD_VOCAB
from tests.eagle_heads import HIDDEN, save_head
from tests.overlap.toy import CPU, Alone, law, toy
from vllm_specplus import registry
from vllm_specplus.config import parse
from vllm_specplus.drafting import cache
from vllm_specplus.overlap.loop import ANSWER
from vllm_specplus.overlap.messages import Message, from_bytes
from vllm_specplus.overlap.rounds import overlapped
from vllm_specplus.overlap.steps import UNDRAFTED
from vllm_specplus.proposer import Services
from vllm_specplus.step import Sampling, StepContext, bare_step
from vllm_specplus.tree import DraftBatch

NODES = 6
OWN = {"overlap": True, "draft_cores": "0"}


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> str:
    return save_draft(tmp_path_factory.mktemp("draft"))


def step_of(texts: list, temperature: float = 0.0, nodes: int = NODES) -> StepContext:
    """A step whose requests are seeded, so that what is drawn depends on the text alone. With
    these seeds no draw falls so close between two tokens that rounding decides."""
    width = max(map(len, texts))
    tokens = np.zeros((len(texts), width), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    requests = len(texts)
    sampling = Sampling(
        np.full(requests, temperature, np.float32), np.full(requests, VOCAB, np.int32),
        np.ones(requests, np.float32), [30 + r for r in range(requests)],
    )  # fmt: skip
    return replace(
        bare_step((), tokens, nodes), num_tokens=np.array([len(text) for text in texts], np.int32),
        sampling=sampling, versions=np.arange(requests), acceptance=None,
    )  # fmt: skip


def made(config: dict, services: Services | None = None, ahead: bool = True):
    proposer = registry.method_class(config["method"])
    parsed = parse((OWN if ahead else {}) | config)
    drafter = (overlapped(proposer) if ahead else proposer)(parsed, services or Services(VOCAB))
    drafter.load_draft(CPU, torch.float32)
    return drafter


def trees(drafts: DraftBatch | Message) -> list[tuple]:
    """Of each request: tokens, parents, and the rows that its nodes were drawn from."""
    if isinstance(drafts, Message):
        arrays = drafts.arrays
        q = from_bytes(arrays["q"], torch.float32, CPU) if "q" in arrays else None
        drafts = DraftBatch(
            arrays["tokens"], arrays["parents"], arrays["counts"], None, q,
            arrays.get("drawn_from"),
        )  # fmt: skip
    found = []
    for end, count in zip(np.cumsum(drafts.counts), drafts.counts, strict=True):
        own = slice(int(end - count), int(end))
        q = None if drafts.draft_probs is None else drafts.draft_probs[drafts.drawn_from[own]]
        found.append((drafts.tokens[own].tolist(), drafts.parents[own].tolist(), q))
    return found


def assert_alike(found: list[tuple], expected: list[tuple]) -> None:
    for (tokens, parents, q), (right_tokens, right_parents, right_q) in zip(
        found, expected, strict=True
    ):
        assert (tokens, parents) == (right_tokens, right_parents)
        assert (q is None) == (right_q is None)
        if q is not None:
            torch.testing.assert_close(q, right_q, atol=1e-5, rtol=1e-4)


KEYS = [
    {"shape": "topk", "width": 3},
    {"shape": "topk", "width": 3, "temperature": 0.0},
    {"shape": "chain"},
    {"shape": "rsd_s", "width": 3},
    {"shape": "rsd_c", "branching": [2, 2]},
    {"shape": "spectr", "width": 3},
    {"shape": "rsd_s", "width": 2, "temperature": 0.0},
    {"shape": "rsd_s", "width": 3, "overlap": "paper"},
    {"shape": "rsd_s", "width": 3, "method": "easyspec", "group_size": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("keys", KEYS, ids=lambda keys: "-".join(map(str, keys.values())))
def test_what_was_drafted_ahead_is_what_would_be_drafted_behind(draft, keys):
    """Below every outcome; then some outcomes come and some do not, round after round."""
    keys = {"method": "draft_tree", "num_speculative_tokens": NODES, "model": draft} | keys
    temperature = keys.pop("temperature", 0.8)
    process = Alone(made(OWN | keys))
    plain = made({k: v for k, v in keys.items() if k != "overlap"}, ahead=False)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (5, 40, 17)]
    foreseen = [False] * 3
    for turn in range(5):
        step = step_of(texts, temperature)
        answer = process.ask(step)
        assert answer.arrays["foreseen"].tolist() == foreseen
        assert_alike(trees(answer), trees(plain.propose(step)))
        ahead = [process.drafter.ahead[f"request {r}"] for r in range(3)]
        assert {len(each) for each in ahead} == {process.drafter.guesses}
        fresh = made({k: v for k, v in keys.items() if k != "overlap"}, ahead=False)
        for outcomes in zip(*ahead, strict=True):
            behind = step_of(
                [np.append(text, each.tokens).astype(np.int32)
                 for text, each in zip(texts, outcomes, strict=True)],
                temperature,
            )  # fmt: skip
            expected = trees(fresh.propose(replace(behind, versions=None)))
            found = [
                (each.tree.tokens.tolist(), each.tree.parents.tolist(),
                 None if right[2] is None else each.tree.q[each.tree.drawn_from])
                for each, right in zip(outcomes, expected, strict=True)
            ]  # fmt: skip
            assert_alike(found, expected)
        foreseen = [(turn + r) % 3 > 0 for r in range(3)]
        texts = [
            np.append(text, own[-1].tokens if came else [7, 7, 7]).astype(np.int32)
            for text, own, came in zip(texts, ahead, foreseen, strict=True)
        ]
    assert process.faults == []


def test_the_answer_to_what_was_foreseen_needs_no_pass():
    process = toy(law(1), shape="topk", width=2, num_speculative_tokens=4)
    executor = process.drafter._executor
    process.ask(step_of([[0, 1]], nodes=4))
    (first, *_) = process.drafter.ahead["request 0"]
    executor.passes = 0
    answered = []
    send = process.channel.send

    def counted(kind, *rest, **fields):
        answered.append((kind, executor.passes))
        send(kind, *rest, **fields)

    process.channel.send = counted
    process.ask(step_of([[0, 1, *first.tokens]], nodes=4))
    assert answered == [(ANSWER, 0)]
    # Reading, the tree that is verified, the outcomes, and one level below them.
    assert executor.passes == 4


def test_a_step_that_is_not_waited_for_is_foreseen_from_its_text_alone():
    table = law(2)
    process = toy(table, shape="topk", width=2, num_speculative_tokens=4)
    answer = process.ask(step_of([[0, 1]], nodes=4), wanted=False)
    assert answer.arrays["counts"].tolist() == [0]
    outcomes = [each.tokens for each in process.drafter.ahead["request 0"]]
    best = np.argsort(-table[0, 1], kind="stable")[:3]
    assert outcomes == [(token,) for token in best.tolist()]


def test_drafts_that_are_worth_less_than_waiting_are_not_made_for_the_step():
    """Each is worth 1."""
    process = toy(law(2), shape="topk", width=2, num_speculative_tokens=4)
    answer = process.ask(step_of([[0, 1], [2, 2]], nodes=4), price=2.5)
    assert answer.arrays["counts"].tolist() == [0, 0]
    assert {len(each.tokens) for each in process.drafter.ahead["request 1"]} == {1}
    answer = process.ask(step_of([[0, 1, 3, 3], [2, 2, 3, 3]], nodes=4), price=1.5)
    assert answer.arrays["counts"].tolist() == [4, 4]


def interrupt(process: Alone, at: int, say) -> None:
    """``say`` something while the pass of that number, from 1, of the next round runs."""
    executor = process.drafter._executor
    count = [0]

    def counted(run):
        def one(*arguments, **keys):
            count[0] += 1
            if count[0] == at:
                say()
            return run(*arguments, **keys)

        return one

    executor.grow, executor.begin = counted(executor.grow), counted(executor.begin)


@pytest.mark.parametrize("at", range(1, 6))
@pytest.mark.parametrize("came", [False, True])
def test_a_newer_step_ends_what_is_of_no_use(at, came):
    """Within each pass of a round of five: reading, a level, the tree, outcomes, a level. From the
    third on it is known what the outcomes are; one that came is drafted to its end."""
    process = toy(law(4), shape="chain", num_speculative_tokens=2)
    process.ask(step_of([[0, 1]], 0.8, 2))
    (likely, *_) = process.drafter.ahead["request 0"]

    process = toy(law(4), shape="chain", num_speculative_tokens=2)
    newer = [0, 1, *(likely.tokens if came else (3, 3, 3, 3))]
    interrupt(process, at, lambda: process.tell(step_of([newer], 0.8, 2)))
    process.tell(step_of([[0, 1]], 0.8, 2))
    process.work()
    first, second = (each for each in process.channel.said if each.kind == ANSWER)
    assert [first.fields["number"], second.fields["number"]] == [1, 2]
    assert first.arrays["counts"].tolist() == [2 * (at > 1)]
    assert second.arrays["counts"].tolist() == [2]
    assert second.arrays["foreseen"].tolist() == [came and at > 2]
    assert process.faults == []


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_step_that_gave_up_waiting_goes_on_without_trees(at):
    """Where that is known before the tree is complete, it is not even sent."""
    process = toy(law(4), shape="chain", num_speculative_tokens=2)
    gave_up = Message(UNDRAFTED, {"number": 1})
    interrupt(process, at, lambda: process.channel.to_hear.append(gave_up))
    answer = process.ask(step_of([[0, 1]], 0.8, 2))
    assert answer.arrays["counts"].tolist() == [2 * (at > 1)]
    assert {len(each.tokens) for each in process.drafter.ahead["request 0"]} == {1}
    assert process.faults == []


def test_a_fault_costs_a_step():
    process = toy(law(4), shape="chain", num_speculative_tokens=2)
    executor, grow = process.drafter._executor, process.drafter._executor.grow

    def fail(*arguments, **keys):
        raise RuntimeError("planted")

    executor.grow = fail
    answer = process.ask(step_of([[0, 1]], 0.8, 2))
    assert answer.arrays["counts"].tolist() == [0]
    assert process.faults == ["RuntimeError: planted"]
    executor.grow = grow
    answer = process.ask(step_of([[0, 1, 2]], 0.8, 2))
    assert answer.arrays["counts"].tolist() == [2]


@pytest.mark.parametrize("generation", [1, 3])
def test_a_head_goes_on(tmp_path, generation):
    """From its own features, a level at a time; the next step reads the target's."""
    folder = save_head(tmp_path, generation, HEAD_VOCAB, max_position_embeddings=512)
    generator = torch.Generator().manual_seed(0)
    vocabulary = Vocabulary(*torch.randn(2, HEAD_VOCAB, HIDDEN, generator=generator))
    services = Services(HEAD_VOCAB, target_vocabulary=lambda: vocabulary)
    config = {"method": "eagle_tree", "model": folder, "num_speculative_tokens": NODES}
    process, plain = Alone(made(config, services)), made(config, services, ahead=False)
    process.teller._page = PAGE
    for each in (process.drafter, plain):
        each.share_pages(40, PAGE, 4)
    states = 3 if generation == 3 else 1
    texts = Texts([9, 30], states, [[5, 37, 36, 35, 34, 33], [*range(10, 25)]])
    begin = [0, 0]
    foreseen = [False, False]
    for turn in range(3):
        ends = texts.lengths.tolist()
        step = replace(
            bare_step((), texts.tokens, NODES), num_tokens=texts.lengths.astype(np.int32),
            target_rows=texts.rows(
                [(a, n - 1) for a, n in zip(begin, ends, strict=True)]
            ), acceptance=None, versions=np.arange(2),
        )  # fmt: skip
        answer = process.ask(step)
        assert process.faults == []
        assert answer.arrays["foreseen"].tolist() == foreseen
        assert (answer.arrays["counts"] == NODES).all()
        if not any(foreseen):
            assert_alike(trees(answer), trees(plain.propose(step)))
        ahead = [process.drafter.ahead[f"request {r}"] for r in range(2)]
        begin = [n - 1 for n in ends]
        foreseen = [True, turn == 0]
        for r, came in enumerate(foreseen):
            gained = ahead[r][0].tokens if came else (1, 2)
            end = int(texts.lengths[r])
            texts.tokens[r, end : end + len(gained)] = gained
            texts.lengths[r] = end + len(gained)


@pytest.mark.parametrize("packed", [True, False])
def test_a_whole_tree_in_one_pass_is_its_paths(draft, monkeypatch, packed):
    """Against transformers, and nodes of a tree that a level is not of are nobody's."""
    if not packed:
        monkeypatch.setattr(cache.native, "unsupported", lambda batch: "for the test")
    run = executor(draft, max_nodes=12)
    assert run.cache.packed == packed
    rng = np.random.default_rng(2)
    texts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (6, 21)]
    assert all(run.room(name, len(text)) for name, text in zip("ab", texts, strict=True))
    run.begin(["a", "b"], texts)
    # Only of the first text.
    run.grow(torch.tensor([0]), torch.tensor([[4, 9]]), torch.tensor([[-1, -1]]))
    # In two generations more, below the level before or the text; the second tree is padded.
    below = [[0, 2, 2, 1, 3, -1], [-1, 2, 3, -1, 5, -1]]
    tokens = rng.integers(0, VOCAB, (2, 6))
    logits = run.grow(torch.arange(2), torch.from_numpy(tokens), torch.tensor(below), generations=3)
    paths: list[dict[int, list[int]]] = [{-1: [], 0: [4], 1: [9]}, {-1: []}]
    for r, own in enumerate(below):
        for j, above in enumerate(own):
            paths[r][2 + j] = [*paths[r][above], int(tokens[r, j])]
            right = logits_of(draft, np.append(texts[r], paths[r][2 + j]))
            torch.testing.assert_close(logits[r, j], right, atol=2e-5, rtol=1e-4)
