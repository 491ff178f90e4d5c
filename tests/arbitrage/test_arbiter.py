"""Step-level speculation: who writes which step, behind which text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.arbitrage.fakes import FakeModel, FakeRouter, recital
from tests.arbitrage.serving import World, text_of, writers
from vllm_specplus.arbitrage import arbiter as arbiter_module
from vllm_specplus.arbitrage.arbiter import Limits
from vllm_specplus.arbitrage.engines import EngineError, Refused
from vllm_specplus.arbitrage.routers import Drawn, RewardThreshold
from vllm_specplus.arbitrage.steps import End, Job, Step, Writer, Written, router_text

DRAFT = ("d0", "d1", "d2", "d3")
TARGET = ("t0", "t1", "t2", "t3")
#: Of the target, by step, and as scores of a router that knows them.
ADVANTAGE = {"d0": 0.3, "d1": -0.1, "d2": 0.2, "d3": 0.05}


def world(limits: Limits | None = None, **of_steps: float) -> World:
    return World.of(DRAFT, TARGET, limits, **of_steps)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(arbiter_module, "AGAIN", 0.0)


def test_from_one_on_all_is_the_drafts_and_nobody_else_is_asked():
    made = world()
    steps = made.steps(1.0)
    assert text_of(steps) == "d0\n\nd1\n\nd2\n\nd3"
    assert not made.target.asked
    assert not made.router.asked
    assert [step.end for step in steps] == [End.SEPARATOR] * 3 + [End.ANSWER]


def test_below_zero_all_is_the_targets_and_nobody_else_is_asked():
    made = world()
    steps = made.steps(-0.1)
    assert text_of(steps) == "t0\n\nt1\n\nt2\n\nt3"
    assert not made.draft.asked
    assert not made.router.asked


@pytest.mark.parametrize(
    ("threshold", "who"),
    [(0.05, "tdtd"), (0.19, "tdtd"), (0.2, "tddd"), (0.3, "dddd"), (0.04, "tdtt")],
)
def test_a_budget_of_two_escalates_the_two_largest_advantages(threshold, who):
    """Thresholds within [.05, .2) do; at one that is a score the step is kept: escalated is what is
    above it, as in the paper."""
    made = world(**{name: max(each, 0.0) for name, each in ADVANTAGE.items()})
    steps = made.steps(threshold)
    assert writers(steps) == who
    # Lazily: the target has written what is escalated, and nothing else.
    assert len(made.target.asked) == who.count("t")
    assert len(made.draft.asked) == len(made.router.asked) == 4
    assert [step.score for step in steps] == [0.3, 0.0, 0.2, 0.05]


def test_a_rejected_step_never_gets_into_the_text():
    made = world(d0=0.9, d1=0.1, d2=0.9, d3=0.1)
    steps = made.steps(0.5)
    assert text_of(steps) == "t0\n\nd1\n\nt2\n\nd3"
    before = ["q\n", "q\nt0\n\n", "q\nt0\n\nd1\n\n", "q\nt0\n\nd1\n\nt2\n\n"]
    assert made.draft.prompts == before
    assert made.target.prompts == [before[0], before[2]]


def test_what_the_router_reads():
    """Its question, the steps with who has written them, and the draft's next as the draft's."""
    made = world(d0=0.9, d1=0.1, d2=0.1, d3=0.1)
    made.steps(0.5)
    assert made.router.asked[-1] == ("q\nModel 1: t0\n\nModel 0: d1\n\nModel 0: d2\n\nModel 0: d3")
    told = [(Writer.TARGET, "a\n\n"), (Writer.DRAFT, "b\n\n")]
    assert router_text("Why?", told, "c\n\n") == "Why?\nModel 1: a\n\nModel 0: b\n\nModel 0: c\n\n"


def test_an_end_within_a_step_ends_the_answer():
    made = World.of(("d0", "d1 is all"), TARGET, d0=0.0, d1=0.0)
    steps = made.steps(0.5)
    assert text_of(steps) == "d0\n\nd1 is all"
    assert steps[-1].end is End.ANSWER


def test_a_draft_that_ends_too_early_may_be_corrected():
    """The target writes the last step anew, and the answer goes on."""
    made = World.of(("d0", "end", "d2"), TARGET, d0=0.0, end=1.0, d2=0.0)
    made.draft.says = lambda text: ("d0\n\n", "end", "d2")[text.count("\n\n")]
    assert text_of(made.steps(0.5)) == "d0\n\nt1\n\nd2"


def test_tokens_of_all_steps_are_bounded_together():
    made = world(d0=0.0, d1=1.0)
    steps = made.steps(0.5, max_tokens=9)
    assert text_of(steps) == "d0\n\nt1\n\nd"
    assert steps[-1].end is End.LENGTH
    assert [body["max_tokens"] for body in made.draft.asked] == [9, 5, 1]
    assert made.target.asked[0]["max_tokens"] == 5


def test_a_long_step_is_judged_as_it_is_and_goes_on_as_the_next():
    full = "one two three\n\nfour"
    made = World(
        FakeModel("small", recital("q", full)), FakeModel("large", recital("q", full)),
        FakeRouter(lambda _: 0.0), Limits(step_tokens=5),
    )  # fmt: skip
    steps = made.steps(0.5)
    assert text_of(steps) == full
    assert [step.text for step in steps] == ["one t", "wo th", "ree\n\n", "four"]


def test_steps_are_bounded():
    made = world(Limits(max_steps=2), d0=0.0, d1=0.0)
    assert text_of(made.steps(0.5)) == "d0\n\nd1\n\n"


def test_where_the_drafts_context_ends_the_target_goes_on():
    made = world(d0=0.0)
    made.draft.context = len("q\nd0\n\nd")
    steps = made.steps(0.5)
    assert writers(steps) == "ddttt"
    assert text_of(steps) == "d0\n\ndt1\n\nt2\n\nt3"
    assert len(made.draft.asked) == 2


def test_where_the_targets_context_ends_the_answer_does():
    made = world(d0=1.0, d1=1.0)
    made.target.context = len("q\nt0\n\nt")
    steps = made.steps(0.5)
    assert text_of(steps) == "t0\n\nt"
    assert steps[-1].end is End.LENGTH
    # Also where only the draft has written before.
    made = world(d0=0.0, d1=1.0)
    made.target.context = 3
    assert text_of(made.steps(0.5)) == "d0\n\n"


def test_seeds_differ_by_step_and_writer_and_come_again():
    made = world(d0=1.0, d1=1.0, d2=1.0, d3=1.0)
    made.steps(0.5, seed=7)
    seeds = [body["seed"] for body in made.draft.asked + made.target.asked]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    again = world(d0=1.0, d1=1.0, d2=1.0, d3=1.0)
    again.steps(0.5, seed=7)
    assert [body["seed"] for body in again.draft.asked + again.target.asked] == seeds
    made.steps(0.5)
    assert "seed" not in made.draft.asked[-1]


def test_what_a_step_is_asked_with():
    made = world(d0=0.0, d1=0.0, d2=0.0, d3=0.0)
    made.steps(0.5, sampling={"temperature": 0.0}, stop=("Q:",), special_tokens=False)
    body = made.draft.asked[0]
    assert body == {
        "model": "small", "prompt": "q\n", "max_tokens": 1000, "temperature": 0.0,
        "stop": ["\n\n", "Q:"], "include_stop_str_in_output": True, "add_special_tokens": False,
    }  # fmt: skip


@pytest.mark.parametrize(("pause", "who"), [(0.0, "tddd"), (60.0, "tttt")])
def test_without_a_draft_the_target_writes(monkeypatch, pause, who):
    """A draft that does not answer is left alone for a while."""
    monkeypatch.setattr(arbiter_module, "PAUSE", pause)
    made = world(d1=0.0, d2=0.0, d3=0.0)
    made.draft.faults = [500]
    assert writers(made.steps(0.5)) == who
    assert len(made.draft.asked) == 1 + who.count("d")


def test_a_draft_that_refuses_is_not_asked_again():
    made = world()
    made.draft.faults = [400]
    assert writers(made.steps(0.5)) == "tttt"
    assert len(made.draft.asked) == 1


def test_without_the_routers_word_the_target_writes():
    made = world(d0=0.0, d1=0.0, d2=0.0, d3=0.0)
    made.router.faults = [200, 503]
    steps = made.steps(0.5)
    assert writers(steps) == "dtdd"
    assert steps[1].score is None


def test_a_target_is_asked_twice_and_not_more():
    made = world(d0=1.0, d1=1.0, d2=0.0, d3=0.0)
    made.target.faults = [503, 200, 502]
    assert writers(made.steps(0.5)) == "ttdd"
    made.target.faults = [503, 500]
    with pytest.raises(EngineError, match="the target at http://target answers 500: fault 500"):
        made.steps(0.5)


def test_what_the_target_refuses_at_first_is_refused():
    made = world(d0=1.0)
    made.target.faults = [400]
    with pytest.raises(Refused, match="the target refuses: fault 400") as refused:
        made.steps(0.5)
    assert refused.value.status == 400


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_drawn_router_escalates_the_share_that_it_is_told(share):
    steps = ["d"] * 400
    made = World.of(steps, ["t"] * 400, Limits(max_steps=500))
    found = writers(made.steps(1 - share, Drawn(0), max_tokens=10_000))
    assert found.count("t") / 400 == pytest.approx(share, abs=0.06)
    assert (found.count("t") == 0) == (share == 0.0)


def test_a_reward_threshold_keeps_what_scores_high():
    def reward(job: Job, steps: Sequence[str]) -> float:
        return 0.9 if steps[-1].startswith(("d0", "d2")) else 0.2

    assert writers(world().steps(0.5, RewardThreshold(reward))) == "dtdt"


def test_steps_say_what_they_have_waited_for():
    made = world(d0=0.0, d1=1.0, d2=0.0, d3=0.0)
    first, second, *_ = made.steps(0.5)
    assert set(first.seconds) == {"draft", "router"}
    assert set(second.seconds) == {"draft", "router", "target"}
    assert isinstance(first, Step)
    assert Written("a", 1, End.ANSWER).end == "answer"
