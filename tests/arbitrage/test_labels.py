"""What routers learn from: both models' steps behind the same text, and the better one gone on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import httpx
import pytest

from tests.arbitrage.fakes import FakeModel, script
from tests.arbitrage.serving import World
from vllm_specplus.arbitrage import labels
from vllm_specplus.arbitrage.engines import Client, Endpoint
from vllm_specplus.arbitrage.labels import Pair, compared, done_before, label
from vllm_specplus.arbitrage.steps import Writer
from vllm_specplus.bench import InputError
from vllm_specplus.bench.arithmetic import SEPARATOR, problems

#: A stub of a reward: of the last step, by its text.
REWARDS = {
    "d0": 0.5, "t0": 0.5, "d1": 0.2, "t1": 0.9, "d2": 0.7, "t2": 0.6, "d3": 0.1, "t3": 0.3,
}  # fmt: skip


async def reward(steps: Sequence[str]) -> float:
    return REWARDS[steps[-1].strip()]


def rows_of(world: World, **keys) -> list[dict]:
    async def run() -> list[dict]:
        async with world.arbiter() as arbiter:
            pair = Pair(arbiter.draft, arbiter.target, 10, 1000, **keys)
            return await compared(pair, "q", dict.fromkeys(Writer, "q\n"), reward, True)

    return asyncio.run(run())


def test_the_better_step_goes_on():
    """The draft's where both are as good: an oracle's choice at every step."""
    world = World.of(("d0", "d1", "d2", "d3"), ("t0", "t1", "t2", "t3"))
    rows = rows_of(world)
    assert [row["candidate"].strip() for row in rows] == ["d0", "d1", "d2", "d3"]
    gone_on = [step["text"].strip() for step in rows[-1]["steps"]]
    assert gone_on == ["d0", "t1", "d2"]
    assert [step["writer"] for step in rows[-1]["steps"]] == ["draft", "target", "draft"]
    scores = [(row["draft_score"], row["target_score"]) for row in rows]
    assert scores == [(0.5, 0.5), (0.2, 0.9), (0.7, 0.6), (0.1, 0.3)]
    # Both have read the same text every time.
    assert world.draft.prompts == world.target.prompts
    assert world.draft.prompts[-1] == "q\nd0\n\nt1\n\nd2\n\n"


def test_samples_of_the_target_count_by_their_mean():
    world = World.of(("d1",), ("t1",))
    says = iter(["t1", "t2", "t3"])
    world.target.says = lambda _: next(says)
    (row,) = rows_of(world, samples=3, temperature=0.7)
    assert row["target_score"] == pytest.approx((0.9 + 0.6 + 0.3) / 3)
    assert [body["temperature"] for body in world.target.asked] == [0.7] * 3
    assert world.draft.asked[0]["temperature"] == 0.0


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    drawn = problems(0, False)
    made = [next(drawn) for _ in range(4)]
    path.write_text("".join(f"{json.dumps(each.to_row())}\n" for each in made))
    return path, made


def mine(questions, out, limit=10) -> int:
    """A target that is right, and a draft that says nothing of use, over ASGI."""
    path, made = questions

    def answers(text: str) -> str:
        problem = next(each for each in made if text.startswith(each.text))
        steps = [f"{a} {op} {b} = {c}." for a, op, b, c in problem.equations]
        return script(problem.text, *steps, f"The answer is {problem.totals[-1]}.")(text)

    models = {"draft": FakeModel("small", lambda _: "Hm."), "target": FakeModel("large", answers)}

    async def run() -> int:
        mounts = {f"http://{n}": httpx.ASGITransport(app=m.app) for n, m in models.items()}
        async with httpx.AsyncClient(mounts=mounts) as http:
            engines = [Endpoint(Client(name, f"http://{name}", http)) for name in models]
            for each in engines:
                await each.connect()
            return await label(Pair(*engines, 20, 1000), None, path, out, limit, chat=False)

    return asyncio.run(run())


def test_arithmetic_checks_itself(questions, tmp_path):
    out = tmp_path / "steps.jsonl"
    count = mine(questions, out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert count == len(rows) == sum(len(each.events) + 1 for each in questions[1])
    assert {(row["draft_score"], row["target_score"]) for row in rows} == {(0.0, 1.0)}
    last = [row for row in rows if row["id"] == questions[1][0].id][-1]
    assert len(last["steps"]) == len(questions[1][0].events)
    assert all(step["text"].endswith(SEPARATOR) for step in last["steps"])


def test_an_ended_run_goes_on_with_what_is_missing(questions, tmp_path):
    out, whole = tmp_path / "steps.jsonl", tmp_path / "whole.jsonl"
    mine(questions, whole)
    mine(questions, out, limit=2)
    with out.open("a") as file:
        file.write('{"id": "cut sho')
    assert done_before(out) == {each.id for each in questions[1][:2]}
    mine(questions, out)
    assert sorted(out.read_text().splitlines()) == sorted(whole.read_text().splitlines())


def test_other_questions_want_a_reward_model(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "Why?"}\n')
    with pytest.raises(InputError, match="name a process reward model by --reward"):
        mine((path, []), tmp_path / "out.jsonl")


def test_a_reward_model_reads_the_steps_without_names():
    read = []

    class Judge:
        async def probability(self, text: str, cache_salt: str | None = None) -> float:
            read.append(text)
            return 0.5

    assert asyncio.run(labels.rewards_of(Judge(), "q")(["a\n\n", "b"])) == 0.5
    assert read == ["q\na\n\nb"]
