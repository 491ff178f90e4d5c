"""Self-speculation on two ranks, here threads, against the same on one."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from tests.drafting.test_drafting import VOCAB, save_draft
from tests.drafting.test_self_speculation import LAYERS, SKIPS, FakeTarget, load, random_texts
from vllm_specplus import registry
from vllm_specplus.config import parse
from vllm_specplus.drafting.lockstep import Lockstep, LockstepExecutor, RanksApart
from vllm_specplus.drafting.self_speculation import SelfDraftExecutor
from vllm_specplus.proposer import Services

NODES, SLOTS, RANKS = 6, 4000, 2
ROOT = torch.full((3, 2), -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_draft(tmp_path_factory.mktemp("target"), layers=LAYERS)


class Meeting:
    """Where the ranks wait for each other, and see whether all came for the same."""

    def __init__(self):
        self.barrier = threading.Barrier(RANKS, timeout=30)
        self._brought: list = [None] * RANKS

    def exchange(self, rank: int, kind: str, value) -> list:
        """What each rank brings."""
        self._brought[rank] = kind, value
        self.barrier.wait()
        brought = list(self._brought)
        self.barrier.wait()
        if {each for each, _ in brought} != {kind}:
            raise RuntimeError(f"ranks came for {[each for each, _ in brought]}")
        return [value for _, value in brought]


class ThreadRanks:
    """The ``Ranks`` of one thread."""

    def __init__(self, meeting: Meeting, rank: int):
        self.meeting, self.rank = meeting, rank

    def announce(self, what=None):
        return self.meeting.exchange(self.rank, "announce", what)[0]

    def broadcast(self, tensor):
        first = self.meeting.exchange(self.rank, "broadcast", tensor)[0]
        if self.rank:
            tensor.copy_(first)
        self.meeting.exchange(self.rank, "broadcast", None)

    def summed(self, part: torch.Tensor) -> torch.Tensor:
        return sum(self.meeting.exchange(self.rank, "sum", part))


class Divided:
    """A model whose heads are divided among the ranks. All else each rank computes a half of."""

    def __init__(self, folder: str, ranks: ThreadRanks):
        self._whole, self._ranks = load(folder), ranks

    def __getattr__(self, name):
        return getattr(self._whole, name)

    def attention(self, layer, hidden, rotary, attend):
        def own_heads(number, query, *rest, **given):
            out = attend(number, query, *rest, **given)
            out[:, (torch.arange(query.shape[1]) % RANKS) != self._ranks.rank] = 0
            return out

        return self._ranks.summed(self._whole.attention(layer, hidden, rotary, own_heads))

    def embed(self, tokens):
        return self._ranks.summed(self._whole.embed(tokens) / RANKS)

    def mlp(self, layer, hidden):
        return self._ranks.summed(self._whole.mlp(layer, hidden) / RANKS)

    def logits(self, hidden):
        return self._ranks.summed(self._whole.logits(hidden) / RANKS)


class Pair:
    """Two ranks with ``members`` executors each; the second one is a thread."""

    def __init__(self, folder: str, members: int = 1):
        self.meeting, self.faults, self.apart = Meeting(), [], None
        self.target: FakeTarget | None = None
        self.lockstep, self.runs = self._rank(folder, 0, members)
        self._other, self.others = self._rank(folder, 1, members)
        self._thread = threading.Thread(target=self._accompany, daemon=True)
        self._thread.start()

    def _rank(self, folder, rank, members):
        ranks = ThreadRanks(self.meeting, rank)
        lockstep = Lockstep(ranks)
        runs = [
            LockstepExecutor(Divided(folder, ranks), SLOTS, NODES, lockstep, self.faults.append)
            for _ in range(members)
        ]
        return lockstep, runs

    def _accompany(self):
        try:
            while True:
                self._other.accompany(lambda requests, at: self.target(requests, at))
        except BaseException as error:
            self.apart = error
            self.meeting.barrier.abort()

    def end(self):
        """Nothing has set them apart, and the other one waits for the next step."""
        assert self.apart is None
        self.meeting.barrier.abort()
        self._thread.join(30)
        assert not self._thread.is_alive()


def grown(count: int) -> list[list[np.ndarray]]:
    """The texts of so many rounds, which grow."""
    rng = np.random.default_rng(4)
    rounds = [random_texts(rng, 5, 17, 40)]
    while len(rounds) < count:
        rounds.append(
            [np.append(t, rng.integers(0, VOCAB, 3)).astype(np.int32) for t in rounds[-1]]
        )
    return rounds


def one_round(run: SelfDraftExecutor, texts: list[np.ndarray], target: FakeTarget) -> list:
    """What the first rank makes of one step."""
    names = [f"r{i}" for i in range(len(texts))]
    assert all(run.room(name, len(text)) for name, text in zip(names, texts, strict=True))
    run.follow(names, texts, np.arange(len(texts)), target)
    exits = [2, LAYERS]
    right, _ = run.replay(names, texts, np.ones(len(texts), int), SKIPS["some"], exits)
    out = [torch.from_numpy(right), run.begin(names, texts)]
    level = torch.arange(6).view(3, 2)
    out.append(run.grow(torch.arange(3), level, ROOT))
    out.append(run.grow(torch.tensor([0, 2]), level[:2], torch.tensor([[0, 1], [1, 1]])))
    return out


def all_rounds(folder, run, lead=nullcontext, show=lambda target: None) -> list:
    out = []
    for number, texts in enumerate(grown(3)):
        target = FakeTarget(folder, texts)
        show(target)
        run.skips = list(SKIPS.values())[number]
        with lead():
            out += one_round(run, texts, target)
    return out


def close(found: list, wanted: list) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_two_ranks_draft_as_one_does(folder):
    """Each attends by pages of its own."""
    pair = Pair(folder)
    (run,) = pair.runs
    found = all_rounds(folder, run, pair.lockstep.lead, lambda t: setattr(pair, "target", t))
    pair.end()
    close(found, all_rounds(folder, SelfDraftExecutor(load(folder), SLOTS, NODES)))
    assert pair.faults == []


def test_every_executor_is_told_its_own(folder):
    """As of two sources of rasd."""
    pair = Pair(folder, members=2)
    (texts,) = grown(1)
    pair.target = FakeTarget(folder, texts)
    found, wanted = [], []
    for run, skips in zip(pair.runs, (SKIPS["some"], SKIPS["after two"]), strict=True):
        alone = SelfDraftExecutor(load(folder), SLOTS, NODES)
        run.skips = alone.skips = skips
        with pair.lockstep.lead():
            found += one_round(run, texts, pair.target)
        wanted += one_round(alone, texts, pair.target)
    pair.end()
    close(found, wanted)


def test_two_ranks_leave_every_request_where_one_does(folder):
    """In one pass for all; and what a target has computed becomes logits on both."""
    pair = Pair(folder)
    (texts,) = grown(1)
    pair.target = FakeTarget(folder, texts)
    states = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))

    def drafts(run: SelfDraftExecutor) -> list:
        names = [f"r{i}" for i in range(len(texts))]
        assert all(run.room(name, len(text)) for name, text in zip(names, texts, strict=True))
        run.follow(names, texts, np.arange(len(texts)), pair.target)
        run.exits = np.array([2, 4, 2])
        level = torch.arange(6).view(3, 2)
        return [
            run.begin(names, texts), run.grow(torch.arange(3), level, ROOT),
            run.grow(torch.tensor([0, 2]), level[:2], ROOT[:2]), run.logits(states),
        ]  # fmt: skip

    (run,) = pair.runs
    with pair.lockstep.lead():
        found = drafts(run)
    wanted = drafts(SelfDraftExecutor(load(folder), SLOTS, NODES))
    pair.end()
    close(found, wanted)


class LostMemory(RuntimeError):
    pass


def fail_once(run: SelfDraftExecutor, layer: int) -> None:
    """In the first pass to come, our attention fails in this layer."""
    write = run.cache.write

    def failing(number, slots, keys, values):
        if number == layer and len(slots) == 3:  # a row of each text: no copy
            run.cache.write = write
            raise LostMemory("no memory for keys")
        write(number, slots, keys, values)

    run.cache.write = failing


def test_a_fault_of_our_attention_costs_a_step(folder):
    pair = Pair(folder)
    ((run,), (texts, longer)) = pair.runs, grown(2)
    pair.target = FakeTarget(folder, texts)
    names = ["r0", "r1", "r2"]
    assert all(run.room(name, len(text)) for name, text in zip(names, texts, strict=True))

    def step():
        with pair.lockstep.lead():
            run.follow(names, texts, np.arange(3), pair.target)
            fail_once(run, layer=2)
            run.begin(names, texts)

    with pytest.raises(LostMemory):
        step()
    pair.target = FakeTarget(folder, longer)
    with pair.lockstep.lead():
        found = one_round(run, longer, pair.target)
    pair.end()
    alone = SelfDraftExecutor(load(folder), SLOTS, NODES)
    close(found, one_round(alone, longer, pair.target))


def test_a_fault_on_another_rank_is_reported_there(folder):
    pair = Pair(folder)
    (run,), (other,) = pair.runs, pair.others
    (texts,) = grown(1)
    pair.target = FakeTarget(folder, texts)
    names = ["r0", "r1", "r2"]
    assert all(run.room(name, len(text)) for name, text in zip(names, texts, strict=True))
    with pair.lockstep.lead():
        run.follow(names, texts, np.arange(3), pair.target)
        before = run.begin(names, texts)
    fail_once(other, layer=2)
    with pair.lockstep.lead():
        without = run.begin(names, texts)
        again = run.begin(names, texts)
    pair.end()
    assert [type(fault) for fault in pair.faults] == [LostMemory]
    assert not torch.allclose(without, before)  # half of the heads of some layers are missing
    close([again], [before])


def test_a_fault_between_passes_lets_the_others_go(folder):
    pair = Pair(folder)
    (run,) = pair.runs
    for _ in range(3):
        with pytest.raises(LostMemory), pair.lockstep.lead():
            raise LostMemory("while trees are planned")
    found = all_rounds(folder, run, pair.lockstep.lead, lambda t: setattr(pair, "target", t))
    pair.end()
    close(found, all_rounds(folder, SelfDraftExecutor(load(folder), SLOTS, NODES)))


def test_a_fault_of_the_targets_layers_ends_the_ranks(folder):
    """They are in different collectives; no guard of drafting goes on."""
    assert not issubclass(RanksApart, Exception)
    pair = Pair(folder)
    (run,), (texts,) = pair.runs, grown(1)
    pair.target = FakeTarget(folder, texts)
    names = ["r0", "r1", "r2"]
    assert all(run.room(name, len(text)) for name, text in zip(names, texts, strict=True))
    run.follow(names, texts, np.arange(3), pair.target)

    def lost(layer, hidden):
        raise LostMemory("in the target's own layer")

    run.model.mlp = lost
    with pytest.raises(RanksApart, match="the others wait in it: the engine has to end"):
        run.begin(names, texts)
    pair.meeting.barrier.abort()  # as when its process ends
    pair._thread.join(30)
    assert isinstance(pair.apart, RanksApart)


def test_without_executors_nobody_is_told():
    lockstep = Lockstep(ThreadRanks(Meeting(), 0))  # would wait for the other rank
    with lockstep.lead():
        lockstep.accompany(lambda requests, at: iter(()))


def test_the_others_load_what_the_first_cannot_draft_without(folder):
    """Of several sources those that draft with the target's layers, in the same order."""
    lockstep = Lockstep(ThreadRanks(Meeting(), 1))
    services = Services(VOCAB, target_layers=lambda: load(folder), lockstep=lockstep)
    own = {"kv_memory_mb": 1, "num_speculative_tokens": 6}
    sources = ["token_recycling", {"method": "early_exit", **own}, {"method": "layer_skip", **own}]
    config = parse({"method": "rasd", "sources": sources})
    proposer = registry.method_class("rasd")(config, services)
    proposer.load_share(torch.device("cpu"), torch.float32)
    executors = [getattr(member, "_executor", None) for member in proposer.members]
    assert lockstep._members == [each for each in executors if each is not None]
    assert len(lockstep._members) == 2
