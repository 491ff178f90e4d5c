"""Slots of latents, and what the CSpD proposer drafts into them, without an engine."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.image.test_continuous import shaken, small_model
from vllm_specplus.config import parse
from vllm_specplus.image.continuous.chain import picture_noise
from vllm_specplus.image.continuous.decoding import (
    Guided,
    Settings,
    Speculation,
    chain_of,
    decode_speculative,
)
from vllm_specplus.image.continuous.slots import LatentSlots, Picture, Windows
from vllm_specplus.proposer import Services
from vllm_specplus.proposers.cspd import Cspd
from vllm_specplus.step import LatentStep, bare_step

SCHEDULE = small_model(end=250).config.schedule()
SETTINGS = Settings(9, 4, SCHEDULE)


def make(slots: int, window: int = 3, guided: bool = False) -> LatentSlots:
    return LatentSlots(SETTINGS, slots, window, guided, torch.device("cpu"))


def picture(i: int, guidance: float = 1.0) -> Picture:
    return Picture(label=i % 3, seed=i, temperature=1.0, guidance=guidance)


@torch.inference_mode()
def test_slots_are_given_lowest_first_and_leave_nothing():
    slots = make(2)
    fresh = [tensor.clone() for tensor in slots.tensors()]
    for i in range(5):
        slots.take(f"r{i}", picture(i))
        slots.latents[slots.of([f"r{i}"])] = float(i + 1)
    assert len(slots) == 8
    assert slots.of([f"r{i}" for i in range(5)]).tolist() == [0, 1, 2, 3, 4]
    # Growing has moved nothing.
    for i in range(5):
        assert slots.latents[i].eq(i + 1).all()
        noise = picture_noise(i, 9, SCHEDULE.steps, 4)
        assert torch.equal(slots.noise.steps[i], noise.steps)
    slots.free("r1")
    slots.free("r3")
    slots.free("never there")
    slots.take("r5", picture(5))
    assert slots.of(["r5", "r4"]).tolist() == [1, 4]
    for name in ("r0", "r2", "r4", "r5"):
        slots.free(name)
    assert "r0" not in slots
    for tensor, before in zip(slots.tensors(), fresh, strict=True):
        assert torch.equal(tensor[:2], before)
        assert not tensor.any()
    assert not slots.drafted.any()
    assert not any(slots.seeds)


@pytest.fixture(scope="module")
def proposer(tmp_path_factory):
    """(function that makes one, the draft)"""
    folder = tmp_path_factory.mktemp("draft")
    shaken(small_model(layers=1, seed=1, end=250)).save(folder)

    def make(**keys) -> Cspd:
        config = parse({"method": "cspd", "model": str(folder)} | keys)
        out = Cspd(config, Services(5))
        out.load_draft(torch.device("cpu"), torch.float32)
        return out

    return make


class Engine:
    """What the model runner does with slots, with the naive model in the place of vLLM's."""

    def __init__(self, target, slots: LatentSlots, proposer: Cspd):
        self.target, self.slots, self.proposer = target, slots, proposer
        self.known: dict[str, int] = {}
        self.drafts: dict[str, int] = {}
        #: Whose conditions are NaN, and who was told to be broken.
        self.spoilt: set[str] = set()
        self.broken: set[str] = set()

    def conditions(self, name: str, count: int) -> torch.Tensor:
        slot, known = int(self.slots.of([name])[0]), self.known[name]
        latents = self.slots.latents[slot : slot + 1]
        session = Guided(self.target, 3, self.slots.guidance[slot : slot + 1]).begin(
            self.slots.labels[slot : slot + 1], 9
        )
        first = torch.tensor([known])
        out = session.conditions(latents, torch.tensor([0]), first, count)[0]
        return out if self.slots.guided else out[:, :32]

    def model(self):
        guided = Guided(self.target, 3, 1.0)
        return guided if self.slots.guided else self.target

    @torch.inference_mode()
    def step(self, names: list[str], discarded=(), padding: int = 0) -> None:
        """``padding``: drafts that vLLM makes up for requests without any."""
        count = np.array([1 + (self.drafts.get(name) or padding) for name in names])
        first = np.array([self.known[name] for name in names])
        windows = Windows(self.slots.of(names), first, count)
        conditions = torch.cat(
            [self.conditions(name, n) for name, n in zip(names, count.tolist(), strict=True)]
        )
        quiet = np.array([name in discarded for name in names])
        for name in set(names) & self.spoilt:
            i = names.index(name)
            conditions[count[:i].sum() : count[: i + 1].sum()] = torch.nan
        drawn = self.slots.verify(self.model(), conditions, windows, quiet, "exact")
        self.broken |= {name for name, broken in zip(names, drawn.broken, strict=True) if broken}
        for name, length in zip(names, drawn.lengths.tolist(), strict=True):
            if name not in discarded:
                self.known[name] += length
        known = np.array([self.known[name] for name in names])
        step = bare_step(self.proposer.sources, np.zeros((len(names), 10), np.int32), 0)
        step.request_ids, step.num_tokens = names, (known + 1).astype(np.int32)
        step.max_nodes = np.clip(8 - known, 0, 3).astype(np.int32)
        step.latents = LatentStep(self.slots, self.slots.of(names))
        drafts = self.proposer.propose(step)
        assert drafts.tokens.tolist() == [0] * len(drafts.tokens)
        self.drafts = dict(zip(names, drafts.counts.tolist(), strict=True))

    def enter(self, name: str, picture: Picture) -> None:
        self.slots.take(name, picture)
        self.known[name] = 0

    def leave(self, name: str) -> torch.Tensor:
        out = self.slots.latents[self.slots.of([name])[0]].clone()
        self.slots.free(name)
        self.proposer.forget(name)
        return out


@pytest.mark.parametrize("guided", [False, True])
def test_pictures_that_come_and_go_are_those_of_the_plain_loop(proposer, guided):
    """In slots that are used again, with more requests than slots at first, and steps in which
    some of them are not."""
    target = shaken(small_model(end=250))
    propose = proposer()
    engine = Engine(target, make(2, window=4, guided=guided), propose)
    made, waiting = {}, [f"p{i}" for i in range(7)]
    running: list[str] = []
    turn = 0
    while waiting or running:
        while waiting and len(running) < 3:
            name = waiting.pop(0)
            engine.enter(name, picture(int(name[1:]), 2.0))
            running.append(name)
        turn += 1
        # One sits out now and then; its drafts wait for it.
        now = [name for i, name in enumerate(running) if (turn + i) % 4] or running
        before = dict(engine.drafts)
        engine.step(now)
        engine.drafts = before | engine.drafts
        for name in [name for name in running if engine.known[name] == 9]:
            running = [other for other in running if other != name]
            made[name] = engine.leave(name)
    seeds = list(range(7))
    labels = torch.arange(7) % 3
    draft = propose._draft
    pair = (Guided(target, 3, 2.0), Guided(draft, 3, 2.0)) if guided else (target, draft)
    expected, counts = decode_speculative(
        *pair, labels, seeds, SETTINGS, Speculation(window=3, prefill=1)
    )
    assert 0 < counts.acceptance < 1
    for i in seeds:
        torch.testing.assert_close(made[f"p{i}"], expected[i], atol=1e-3, rtol=0)


def test_a_request_without_memory_for_its_draft_goes_undrafted(proposer):
    """A megabyte of keys and values is room for 455 pictures of 9 latents, no more."""
    target = shaken(small_model(end=250))
    small = proposer(kv_memory_mb=1)
    engine = Engine(target, make(456), small)
    for i in range(456):
        engine.enter(f"p{i}", picture(i))
    names = ["p454", "p455"]
    engine.step(names)
    assert engine.drafts == {"p454": 3, "p455": 0}
    engine.step(names)
    assert engine.known["p455"] == 2
    assert engine.known["p454"] >= 2


def test_what_was_not_drafted_is_not_judged(proposer):
    """Drafts that the scheduler made up, and requests that hear nothing yet."""
    target = shaken(small_model(end=250))
    engine = Engine(target, make(4), proposer(prefill=9))
    for i in range(3):
        engine.enter(f"p{i}", picture(i))
    names = ["p0", "p1", "p2"]
    engine.step(names, discarded=("p2",), padding=2)
    assert engine.known == {"p0": 1, "p1": 1, "p2": 0}
    assert not engine.slots.latents[2].any()
    with torch.inference_mode():
        label = torch.tensor([0])
        condition = target.conditions(torch.zeros(1, 0, 4), label)[:, 0]
        own = engine.slots.noise[torch.tensor([0]), torch.tensor([0])]
        alone = chain_of(target, condition, own, SETTINGS, label).sample[0]
    torch.testing.assert_close(engine.slots.latents[0, 0], alone, atol=1e-5, rtol=0)


def test_a_picture_of_nan_spoils_no_other(proposer):
    """Neither its neighbour, nor the next one in its slot, whose draft reads the same cache."""
    target = shaken(small_model(end=250))

    def pictures(spoilt: set[str]) -> tuple[list[torch.Tensor], Engine, int]:
        engine = Engine(target, make(2), proposer())
        for i in range(2):
            engine.enter(f"p{i}", picture(i))
        engine.step(["p0", "p1"])
        engine.spoilt = spoilt
        for _ in range(3):
            engine.step(["p0", "p1"])
        # What a wrong proposer would leave.
        with torch.inference_mode():
            engine.proposer._session.cache[:, :, 1] = torch.nan
        engine.leave("p1")
        engine.enter("p2", picture(2))
        drafted = 0
        while min(engine.known["p0"], engine.known["p2"]) < 9:
            names = [name for name in ("p0", "p2") if engine.known[name] < 9]
            engine.step(names)
            drafted += sum(engine.drafts.values())
        return [engine.leave(name) for name in ("p0", "p2")], engine, drafted

    want, whole, _ = pictures(set())
    got, engine, drafted = pictures({"p1"})
    assert not whole.broken
    assert engine.broken == {"p1"}
    assert drafted
    for a, b in zip(got, want, strict=True):
        assert b.abs().sum()
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_the_configs_of_the_embedded_models_fit():
    from vllm_specplus.cli.model import LATENTS_MODEL
    from vllm_specplus.target import Target

    config = json.loads((LATENTS_MODEL / "config.json").read_text())
    target = Target(lambda: None, config["vocab_size"], "causal_latents", 4, 1, 192, latents=config)
    draft = parse({"method": "cspd", "model": str(LATENTS_MODEL / "draft")})
    draft.check_kind(target)
    draft.check_target(target)


@pytest.mark.parametrize("prompt", [[], [0], [5], [-1], [1, 2], [1, 0]])
def test_prompts_are_one_label(prompt):
    from types import SimpleNamespace

    from vllm.exceptions import VLLMValidationError

    from vllm_specplus.engine.models.serving import LabelRenderer

    renderer = object.__new__(LabelRenderer)
    renderer.model_config = SimpleNamespace(hf_config=small_model().config)
    for label in (1, 2, 3, 4):
        renderer.validate_token_ids([label])
    with pytest.raises(
        VLLMValidationError, match=r"the token of one label \(1 to 3, or 4 for any\)"
    ):
        renderer.validate_token_ids(prompt)
