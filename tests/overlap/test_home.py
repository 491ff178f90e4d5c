"""The engine's end: what it returns, what it waits for, and what a lost process costs.

The draft's process is a thread here, or a real one, which is killed and stopped. The target is the
draft's own model or a worse one, decoded greedily: its text must not depend on what is drafted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.drafting.test_drafting import VOCAB, save_draft
from tests.drafting.test_eagle import PAGE, Texts, Vocabulary
from tests.drafting.test_eagle import VOCAB as HEAD_VOCAB
from tests.eagle_heads import HIDDEN, save_head
from vllm_specplus import overlap, registry
from vllm_specplus.config import parse
from vllm_specplus.drafting.executor import DraftExecutor
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.drafting.noise import DRAFTS, VERDICTS, stream
from vllm_specplus.drafting.ray_owners import PlacementError
from vllm_specplus.overlap import keeper
from vllm_specplus.overlap.channel import Channel
from vllm_specplus.overlap.home import OverlappedDraft
from vllm_specplus.overlap.keeper import DraftFault, DraftProcessLost
from vllm_specplus.overlap.loop import LOAD, READY, serve
from vllm_specplus.overlap.pace import Pace
from vllm_specplus.overlap.vocabulary import told
from vllm_specplus.proposer import Services
from vllm_specplus.step import bare_step
from vllm_specplus.tree import accepted_paths

CPU = torch.device("cpu")
#: Threads ignore it; a process is bound to it.
CORE = str(min(os.sched_getaffinity(0)))
TOKENS, NODES = 40, 6


class ThreadProcess:
    """A draft's process that is a thread of this one."""

    def __init__(self, cores: str, run=serve):
        ours, theirs = socket.socketpair()
        self.channel, self.there = Channel(ours), Channel(theirs)
        self._thread = threading.Thread(target=run, args=(self.there, CPU), kwargs={"gpu": ""})
        self._thread.start()

    def pids(self) -> list[int]:
        return []

    def ended(self) -> str | None:
        return "the thread ended" if not self._thread.is_alive() else None

    def close(self) -> None:
        self.channel.close()
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> str:
    return save_draft(tmp_path_factory.mktemp("draft"))


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """A target of more layers, of which the draft is seldom right."""
    return save_draft(tmp_path_factory.mktemp("other"), layers=3)


class Counted:
    """What a proposer counts and reports."""

    def __init__(self) -> None:
        self.names: Counter[str] = Counter()
        self.errors: list[Exception] = []

    def services(self, **more) -> Services:
        count = self.names.update
        return Services(VOCAB, report=self.errors.append, count=lambda name: count([name]), **more)


@pytest.fixture
def counted() -> Counted:
    return Counted()


def config_of(model: str, **keys) -> dict:
    base = {"method": "draft_tree", "model": model, "shape": "topk", "width": 3}
    return base | {"num_speculative_tokens": NODES, "overlap": True, "draft_cores": CORE} | keys


def started(config: dict, services: Services) -> OverlappedDraft:
    method = registry.method_class(config["method"])
    drafter = overlap.proposer(method, parse(config), services)
    assert isinstance(drafter, OverlappedDraft)
    drafter.load_draft(CPU, torch.float32)
    drafter.share_pages(10, 16, 4)
    return drafter


@pytest.fixture
def threads(monkeypatch):
    """A process that is waited for however busy the machine is."""
    monkeypatch.setattr(keeper, "LocalProcess", ThreadProcess)
    monkeypatch.setattr(Pace, "limit", lambda self, depth: 30.0)


class Target:
    """Greedy decoding of a model, without a cache."""

    def __init__(self, folder: str):
        self._run = DraftExecutor(DraftModel(folder, CPU, torch.float32), 4000, 80)

    def best(self, texts: list[list[int]]) -> list[int]:
        """The most probable token behind each text."""
        names = [f"{i}" for i in range(len(texts))]
        arrays = [np.array(text, np.int32) for text in texts]
        assert all(self._run.room(n, len(t)) for n, t in zip(names, arrays, strict=True))
        return self._run.begin(names, arrays).argmax(-1).tolist()

    def plain(self, prompts: list[list[int]]) -> list[list[int]]:
        texts = [list(prompt) for prompt in prompts]
        for _ in range(TOKENS):
            for text, token in zip(texts, self.best(texts), strict=True):
                text.append(token)
        return texts


class Decoding:
    """An engine's loop around a proposer: drafts are verified by a target, greedily."""

    def __init__(self, target: Target, drafter, prompts: list[list[int]]):
        self.target, self.drafter = target, drafter
        self.texts = [list(prompt) for prompt in prompts]
        self.ends = [len(prompt) + TOKENS for prompt in prompts]
        self.steps = self.accepted = self.lost = 0
        self.waited: list[float] = []

    @property
    def going_on(self) -> np.ndarray:
        return np.array([len(t) < end for t, end in zip(self.texts, self.ends, strict=True)])

    def step(self) -> None:
        lengths = np.array([len(text) for text in self.texts], np.int32)
        tokens = np.zeros((len(self.texts), int(lengths.max())), np.int32)
        for row, text in zip(tokens, self.texts, strict=True):
            row[: len(text)] = text
        step = replace(
            bare_step(self.drafter.sources, tokens, NODES), num_tokens=lengths,
            max_nodes=np.where(self.going_on, NODES, 0).astype(np.int32),
            versions=np.arange(len(self.texts)),
        )  # fmt: skip
        start = time.monotonic()
        try:
            drafts = self.drafter.propose(step)
        except DraftProcessLost:
            self.lost += 1
            drafts = None
        self.waited.append(time.monotonic() - start)
        begin = 0
        for r in range(len(self.texts)):
            count = 0 if drafts is None else int(drafts.counts[r])
            own = slice(begin, begin + count)
            begin += count
            if self.going_on[r]:
                nodes = ([], []) if drafts is None else (drafts.tokens[own], drafts.parents[own])
                self._verify(r, *map(list, nodes))
        self.steps += 1

    def _verify(self, r: int, nodes: list[int], parents: list[int]) -> None:
        text = self.texts[r]
        paths = [list(text)]
        for token, parent in zip(nodes, parents, strict=True):
            paths.append([*paths[1 + parent], int(token)])
        sampled = np.array([self.target.best([path])[0] for path in paths], np.int32)
        path, lengths = accepted_paths(
            np.array([text[-1], *nodes], np.int32), np.array([-1, *(1 + np.array(parents, int))],
            np.int32), np.array([0, len(paths)], np.int32), sampled,
        )  # fmt: skip
        gained = sampled[path[0, : lengths[0]]].tolist()
        self.accepted += len(gained) - 1
        text += gained[: self.ends[r] - len(text)]

    def run(self) -> list[list[int]]:
        while self.going_on.any():
            self.step()
        return self.texts


PROMPTS = [[5, 17, 80], [3] * 20, [44, 2, 9, 1]]


@pytest.mark.parametrize("keys", [{}, {"overlap": "paper"}, {"shape": "chain"}], ids=str)
def test_text_is_the_targets_own(threads, counted, draft, keys):
    """With the target as its own draft nearly all that is drafted is right."""
    config = config_of(draft) | keys
    if config["shape"] == "chain":
        del config["width"]
    target, drafter = Target(draft), started(config, counted.services())
    try:
        decoding = Decoding(target, drafter, PROMPTS)
        assert decoding.run() == target.plain(PROMPTS)
    finally:
        drafter.close()
    assert counted.errors == []
    assert decoding.lost == 0
    assert decoding.accepted > 20


def test_text_is_the_targets_own_whatever_is_drafted(threads, counted, draft, other):
    target, drafter = Target(other), started(config_of(draft), counted.services())
    try:
        assert Decoding(target, drafter, PROMPTS).run() == target.plain(PROMPTS)
    finally:
        drafter.close()
    assert counted.errors == []


def silent(channel: Channel, device: torch.device, **about) -> None:
    """Loads, and never answers a step."""
    while True:
        try:
            message = channel.receive(None)
        except ConnectionError:
            return
        if message.kind in (LOAD, "share"):
            channel.send(READY, **about)


def test_a_process_that_does_not_answer_is_waited_for_once(monkeypatch, counted, draft, other):
    """As long as drafting would take; then not at all, until it is taken for lost."""
    monkeypatch.setattr(keeper, "LocalProcess", lambda cores: ThreadProcess(cores, silent))
    monkeypatch.setattr(keeper, "LOST_SECONDS", 0.5)
    target, drafter = Target(other), started(config_of(draft), counted.services())
    drafter._pace.passed(0.05)
    waits, awaited = [], drafter._await

    def recorded(end: float):
        waits.append(end - time.monotonic())
        return awaited(end)

    drafter._await = recorded
    try:
        decoding = Decoding(target, drafter, PROMPTS[:1])
        decoding.step()
        decoding.step()
        assert waits == [pytest.approx(3 * 0.05, abs=0.05)]  # two levels, and what reads
        while not decoding.lost:
            decoding.step()
            time.sleep(0.02)
        assert decoding.run() == target.plain(PROMPTS[:1])
    finally:
        drafter.close()
    assert decoding.accepted == 0


def test_a_process_that_works_on_an_answer_is_not_lost(monkeypatch, counted, draft):
    """A long text is being read: signs of life come, and no answer."""

    def busy(channel, device, **about):
        with contextlib.suppress(ConnectionError):
            while True:
                message = channel.receive(0.05)
                if message is None:
                    channel.send("beat")
                elif message.kind in (LOAD, "share"):
                    channel.send(READY, **about)

    monkeypatch.setattr(keeper, "LocalProcess", lambda cores: ThreadProcess(cores, busy))
    monkeypatch.setattr(keeper, "LOST_SECONDS", 0.3)
    drafter = started(config_of(draft), counted.services())
    drafter._pace.passed(0.001)
    try:
        decoding = Decoding(Target(draft), drafter, PROMPTS[:1])
        for _ in range(8):
            decoding.step()
            time.sleep(0.1)
        assert decoding.lost == 0
        monkeypatch.setattr(keeper, "HUNG_SECONDS", 0.2)
        decoding.step()
        assert decoding.lost == 1
    finally:
        drafter.close()


def test_a_process_that_ends_is_started_anew(threads, monkeypatch, counted, draft):
    target, drafter = Target(draft), started(config_of(draft), counted.services())
    try:
        decoding = Decoding(target, drafter, PROMPTS)
        for _ in range(3):
            decoding.step()
        drafter._keeper.process.there.close()
        deadline = time.monotonic() + 20
        while not decoding.lost and time.monotonic() < deadline:
            decoding.step()
        assert decoding.lost == 1
        while not counted.names["draft_group_rebuilds"] and time.monotonic() < deadline:
            time.sleep(0.05)
        before = decoding.accepted
        assert decoding.run() == target.plain(PROMPTS)
        assert decoding.accepted > before
    finally:
        drafter.close()
    assert counted.errors == []


def test_a_process_that_is_started_anew_draws_by_other_numbers(threads, counted, draft):
    """Its predecessor's have decided texts that go on. Nor are they those of the verdicts."""
    drafter = started(config_of(draft), counted.services())
    try:
        seeds = [torch.initial_seed()]
        seeds += [drafter._keeper._told()[1]["seed"] for _ in range(3)]
    finally:
        drafter.close()
    firsts = set()
    for seed in seeds:
        torch.manual_seed(seed)
        firsts |= {float(torch.rand(1, generator=stream(n, CPU))) for n in (DRAFTS, VERDICTS)}
    assert len(firsts) == 2 * len(seeds)


def test_a_draft_that_cannot_be_loaded_ends_the_start(threads, counted, draft, tmp_path):
    config = config_of(draft)
    method = registry.method_class("draft_tree")
    broken = parse(config).model_copy(update={"model": str(tmp_path)})
    drafter = overlap.proposer(method, broken, counted.services())
    with pytest.raises(PlacementError, match="the draft's process failed"):
        drafter.load_draft(CPU, torch.float32)
    drafter.close()


def test_faults_and_counts_of_the_process_are_the_engines(threads, counted, draft):
    """Three texts that do not fit its memory."""
    config = config_of(draft, kv_memory_mb=1)
    drafter = started(config, counted.services())
    try:
        texts = np.random.default_rng(0).integers(0, VOCAB, (40, 400)).astype(np.int32)
        step = bare_step(drafter.sources, texts, NODES)
        drafts = drafter.propose(step)
        assert 0 < (drafts.counts > 0).sum() < 40
        assert (step.max_nodes > 0).tolist() == (drafts.counts > 0).tolist()
    finally:
        drafter.close()
    assert {type(error) for error in counted.errors} == {DraftFault}
    assert "raise kv_memory_mb (1)" in str(counted.errors[0])


def test_a_head_has_the_targets_vocabulary(threads, counted, tmp_path):
    """Trees of a head in the process are those of one here."""

    class Whole(Vocabulary):
        def parts(self):
            return {"rows": self.embedding, "output": self.matrix}, HEAD_VOCAB, None, 1.0

    folder = save_head(tmp_path, 3, HEAD_VOCAB, max_position_embeddings=512)
    generator = torch.Generator().manual_seed(0)
    vocabulary = Whole(*torch.randn(2, HEAD_VOCAB, HIDDEN, generator=generator))
    services = replace(
        counted.services(target_vocabulary=lambda: vocabulary), vocab_size=HEAD_VOCAB
    )
    config = {"method": "eagle_tree", "model": folder, "num_speculative_tokens": NODES}
    plain = registry.method_class("eagle_tree")(parse(config), services)
    plain.load_draft(CPU, torch.float32)
    plain.share_pages(40, PAGE, 4)
    drafter = overlap.proposer(
        type(plain), parse(config | {"overlap": True, "draft_cores": CORE}), services
    )
    assert drafter.reads_hidden
    assert drafter.borrows_vocabulary
    assert drafter.hidden_layers == plain.hidden_layers
    drafter.load_draft(CPU, torch.float32)
    try:
        drafter.share_pages(40, PAGE, 4)
        texts = Texts([9, 30], 3, [[5, 37, 36], [*range(10, 25)]])
        step = replace(
            bare_step(drafter.sources, texts.tokens, NODES),
            num_tokens=texts.lengths.astype(np.int32),
            target_rows=texts.rows([(0, 8), (0, 29)]), versions=np.arange(2),
        )  # fmt: skip
        here, there = plain.propose(step), drafter.propose(step)
        for name in ("tokens", "parents", "counts", "sources"):
            np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
    finally:
        drafter.close()
    assert counted.errors == []


def test_logits_are_those_of_the_sent_vocabulary():
    from vllm_specplus.overlap.vocabulary import SentVocabulary

    rows, output, bias = torch.randn(10, 6), torch.randn(12, 6), torch.randn(12)

    class Whole:
        def parts(self):
            return {"rows": rows, "output": output, "bias": bias}, 10, 5.0, 0.5

    about, arrays = told(Whole(), torch.float32)
    sent = SentVocabulary.of(about, arrays, torch.float32, CPU)
    hidden = torch.randn(3, 6)
    expected = 0.5 * 5.0 * torch.tanh((hidden @ output.T + bias)[:, :10] / 5.0)
    torch.testing.assert_close(sent.output(hidden), expected)
    assert torch.equal(sent.embed(torch.tensor([[3], [9]])), rows[torch.tensor([[3], [9]])])
    assert SentVocabulary.of(None, {}, torch.float32, CPU) is None


# -- real processes -------------------------------------------------------------------------


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_process_costs_drafts_and_nothing_else(
    monkeypatch, counted, draft, number
):
    """Same text, in bounded time; another process is started, and none is left."""
    monkeypatch.setattr(keeper, "LOST_SECONDS", 1.0)
    target, drafter = Target(draft), started(config_of(draft), counted.services())
    pids = drafter.pids()
    try:
        decoding = Decoding(target, drafter, PROMPTS)
        for _ in range(3):
            decoding.step()
        os.kill(pids[0], number)
        deadline = time.monotonic() + 60
        while not decoding.lost and time.monotonic() < deadline and decoding.going_on.any():
            decoding.step()
            time.sleep(0.05)
        assert decoding.lost == 1
        assert max(decoding.waited[3:]) < 20  # it ends: a wait for the process would not
        while not counted.names["draft_group_rebuilds"] and time.monotonic() < deadline:
            time.sleep(0.1)
        assert drafter.pids() != pids
        assert decoding.run() == target.plain(PROMPTS)
        pids += drafter.pids()
    finally:
        drafter.close()
    assert all(is_gone(pid) for pid in pids)
    assert len(pids) == 2


@pytest.mark.slow
def test_a_process_ends_with_its_engine(counted, draft):
    """Whose end of the channel goes away, however it ends."""
    drafter = started(config_of(draft), counted.services())
    process = drafter._keeper.process
    process.channel.close()
    assert process._process.wait(20) == 0
    drafter.close()
