"""The controller in a simulated world: tokens are drawn, steps take what a table says."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specplus.control.controller import Controller
from vllm_specplus.control.cost import CostCurve, CostProfile, StepCost, StepShape
from vllm_specplus.control.settings import FixedControl, GoodputControl, ThresholdControl
from vllm_specplus.control.switch import PROBE_INTERVALS
from vllm_specplus.control.watch import AFTER
from vllm_specplus.metrics import Counters
from vllm_specplus.step import Observation, Source, StepContext
from vllm_specplus.tree import DraftBatch

MAX_NODES = 16
#: Rows are nearly free up to 8 and dear beyond, as on a small machine.
CURVE = CostCurve(np.array([1, 8, 16, 64]), np.array([0.0100, 0.0107, 0.0155, 0.0443]))
NOTHING = Observation(
    np.empty(0, np.int32), np.empty(0, np.int32), np.empty((0, 1), np.int32), np.empty(0, bool)
)


class World:
    """``requests`` texts; each step drafts a chain per request under a controller.

    A drafted token is the text's with probability ``acceptance``.
    """

    def __init__(
        self, control=None, requests=1, draft_seconds=0.0, seed=0, curve=CURVE, look_seconds=0.0
    ):
        """A step takes ``look_seconds`` more if it is looked at."""
        self.look_seconds, self.looks = look_seconds, 0
        self._nodes = 0  # verified in the next step
        self.counters = Counters()
        source = Source("chain", "chain", 0.5)
        control = control or GoodputControl()
        self.controller = Controller(control, [source], MAX_NODES, 1 << 16, self.counters)
        self.controller.cost = StepCost(CostProfile(curve))
        self.rng = np.random.default_rng(seed)
        self.curve, self.draft_seconds = curve, draft_seconds
        self.texts = self.rng.integers(1, 1000, (requests, 40_000), np.int32)
        self.known = np.full(requests, 10, np.int32)
        self.names = [f"r{i}" for i in range(requests)]
        self.clock = 0.0
        self.tokens = 0

    def step(self, acceptance) -> int:
        """One step; returns the verified nodes."""
        requests = len(self.names)
        if not self.controller.watches(self._nodes > 0):
            self.known += 1
            self._took(requests, 0.0)
            return 0
        self.looks += 1
        step = StepContext(
            self.names, self.texts, self.known.copy(), np.full(requests, MAX_NODES, np.int32),
            np.zeros(requests, bool), NOTHING,
        )  # fmt: skip
        controller = self.controller
        controller.prepare(step)
        tokens, parents, counts = [], [], []
        for r, most in enumerate(step.max_nodes.tolist()):
            right = self.rng.random(most) < np.broadcast_to(acceptance, requests)[r]
            text = self.texts[r, self.known[r] : self.known[r] + most]
            tokens += np.where(right, text, 0).tolist()
            parents += range(-1, most - 1)
            counts.append(most)
        drafts = DraftBatch(*(np.array(x, np.int32) for x in (tokens, parents, counts)))
        controller.drafting_took(step.max_nodes, self.draft_seconds)
        chosen = controller.choose(step, drafts)
        starts = np.cumsum(chosen.counts) - chosen.counts
        for r, count in enumerate(chosen.counts.tolist()):
            path = chosen.tokens[starts[r] : starts[r] + count]
            n = self.known[r]
            right = path == self.texts[r, n : n + count]
            self.known[r] += 1 + (count if right.all() else int(np.argmin(right)))
            self.tokens += int(self.known[r] - n)
        self._nodes = len(chosen.tokens)
        drafting = self.draft_seconds * requests if counts else 0.0
        controller.looked(self.look_seconds + drafting, self._nodes)
        self._took(requests + self._nodes, self.look_seconds + drafting)
        return self._nodes

    def _took(self, rows: int, beside: float) -> None:
        """A step of so many rows went by, and ``beside`` seconds with it."""
        seconds = float(self.curve(rows)) * (1 + 0.03 * self.rng.standard_normal())
        shape = StepShape(len(self.names), rows, 100 * len(self.names))
        self.controller.step_took(shape, seconds)
        self.clock += seconds + beside

    def run(self, steps, acceptance) -> np.ndarray:
        return np.array([self.step(acceptance) for _ in range(steps)])


def best_goodput(acceptance: float, requests: int = 1) -> float:
    """Tokens per second of the best number of nodes, if all is known."""
    k = np.arange(MAX_NODES + 1)
    tokens = 1 + np.concatenate(([0.0], np.cumsum(acceptance ** k[1:])))
    return float(np.max(requests * tokens / CURVE(requests * (1 + k))))


@pytest.mark.parametrize("requests", [1, 6])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.8, 0.95])
def test_goodput_is_close_to_that_of_perfect_knowledge(acceptance, requests):
    world = World(requests=requests)
    world.run(100, acceptance)
    clock, tokens = world.clock, world.tokens
    world.run(500, acceptance)
    reached = (world.tokens - tokens) / (world.clock - clock)
    assert reached > 0.93 * best_goodput(acceptance, requests)


def test_a_drop_and_a_recovery_are_followed():
    """One source, nearly free rows: the hardest case, since nothing but misses tells.

    With several sources the tree itself changes; see test_simulator.py.
    """
    world = World()
    high = world.run(300, 0.9)[-100:].mean()
    assert high > 5
    dropped = world.run(400, 0.0)
    assert dropped[50:100].mean() < 0.4 * high
    assert dropped[-100:].mean() < 1
    recovered = world.run(200, 0.9)
    assert recovered[:50].mean() > 0.75 * high
    assert recovered[50:].mean() == pytest.approx(high, rel=0.3)


def test_never_much_slower_than_plain_decoding():
    """Drafts that are always wrong cost next to nothing."""
    world = World(requests=8)
    world.run(600, 0.0)
    plain = 600 * float(CURVE(8))
    assert world.clock < 1.02 * plain


def test_expectations_come_true_though_estimates_are_too_high(monkeypatch):
    world = World()
    tables = lambda names, salts=None: np.full((len(names), 4, 1), 0.8, np.float32)  # noqa: E731
    monkeypatch.setattr(world.controller.acceptance, "tables", tables)
    world.run(300, 0.5)
    expected, known = world.counters["expected_tokens"], int(world.known[0])
    world.run(600, 0.5)
    expected = world.counters["expected_tokens"] - expected
    gained = int(world.known[0]) - known - 600
    assert 0.9 < expected / gained < 1.3  # calibrating what was calibrated: 1.86


def test_every_request_gets_what_it_deserves():
    """Whatever the other one pays for it: see test_objectives.py."""
    world = World(GoodputControl(objective="throughput"), requests=2)
    world.run(200, [0.95, 0.02])
    before = world.known.copy()
    world.run(200, [0.95, 0.02])
    easy, hard = world.known - before
    assert easy > 3 * 200
    assert hard < 1.1 * 200
    step = StepContext(
        world.names, world.texts, world.known.copy(), np.full(2, MAX_NODES, np.int32),
        np.zeros(2, bool), NOTHING,
    )  # fmt: skip
    world.controller.prepare(step)
    counts = step.max_nodes.copy()
    drafts = DraftBatch(
        np.ones(counts.sum(), np.int32),
        np.concatenate([np.arange(-1, n - 1, dtype=np.int32) for n in counts]),
        counts,
    )
    chosen = world.controller.choose(step, drafts)
    assert chosen.counts[0] > 3
    assert chosen.counts[1] <= 1


def test_load_lowers_the_budget_of_each_request():
    per_request = [World(requests=n).run(200, 0.7)[50:].mean() / n for n in (1, 4, 16)]
    assert per_request[0] > per_request[1] > per_request[2]


def test_a_cheap_method_keeps_looking_while_off():
    """It grows trees that nothing verifies; the text labels them."""
    world = World()
    world.run(400, 0.0)
    before = world.counters.as_dict()
    world.run(100, 0.0)
    after = world.counters.as_dict()
    assert after["nodes_grown"] > before["nodes_grown"] + 100
    assert after["nodes_labelled"] > before["nodes_labelled"] + 50
    assert after["undrafted_steps"] - before["undrafted_steps"] > 90


def test_looking_costs_a_small_share_while_nothing_pays():
    """A look takes a twentieth of a step, so that one step in six is looked at; drafts that come
    true again are found out about."""
    step = float(CURVE(8))
    world = World(requests=8, look_seconds=0.05 * step)
    world.run(400, 0.0)
    clock, looks = world.clock, world.looks
    probes = np.count_nonzero(world.run(600, 0.0))
    assert probes < 10
    assert 600 / 7 < world.looks - looks < 600 / 5 + probes * (AFTER + 1)
    assert world.clock - clock < 1.02 * 600 * step
    assert world.counters["unwatched_steps"] > 600
    looks = world.looks
    assert np.count_nonzero(world.run(100, 0.95)) > 60
    assert world.looks - looks > 65


def test_accounts_hold_whether_steps_were_looked_at_or_not():
    step = float(CURVE(8))
    spent = []
    for look in (0.0, 0.05 * step):
        world = World(requests=8, look_seconds=look)
        world.run(400, 0.0)
        accounts = world.controller._ledger.accounts(world.names)
        spent.append(accounts.spent[0] / accounts.tokens[0] / step)
        assert accounts.plain[0] == pytest.approx(accounts.spent[0], rel=0.05)
    assert spent == [pytest.approx(1.0, abs=0.03)] * 2


def test_shadow_and_fixed_drafting_are_always_looked_at():
    for control in (GoodputControl(mode="shadow"), FixedControl(policy="fixed")):
        world = World(control, requests=8, look_seconds=0.01)
        world.run(100, 0.0)
        assert world.looks == 100
    world = World(GoodputControl(mode="off"), requests=8, look_seconds=0.01)
    world.run(100, 0.9)
    assert world.looks < 30


def test_an_expensive_method_is_probed_ever_more_rarely_and_comes_back():
    world = World(draft_seconds=0.004)
    nodes = world.run(3000, 0.0)
    first, last = nodes[:300], nodes[-1000:]
    assert 0 < np.count_nonzero(last) <= 1000 / PROBE_INTERVALS[1] + 2
    assert np.count_nonzero(first) > np.count_nonzero(last)
    assert world.counters["probe_steps"] > 3
    assert world.run(1500, 0.95)[-200:].mean() > 4


def test_drafting_time_counts():
    """A method that pays if drafts were free, and does not at its price."""
    assert World().run(300, 0.5)[100:].mean() > 1
    assert World(draft_seconds=0.02).run(600, 0.5)[300:].mean() < 0.3


def chain(world, count, requests=1):
    step = StepContext(
        world.names, world.texts, world.known.copy(), np.full(requests, count, np.int32),
        np.zeros(requests, bool), NOTHING,
    )  # fmt: skip
    world.controller.prepare(step)
    counts = np.full(requests, count, np.int32)
    parents = np.tile(np.arange(-1, count - 1, dtype=np.int32), requests)
    drafts = DraftBatch(np.ones(count * requests, np.int32), parents, counts)
    return world.controller.choose(step, drafts)


def test_fixed_verifies_everything_drafted():
    world = World(FixedControl(policy="fixed"), requests=3)
    assert chain(world, 16, 3).counts.tolist() == [16, 16, 16]


@pytest.mark.parametrize(("threshold", "expected"), [(0.3, 0), (0.51, 1), (0.76, 2), (0.9, 3)])
def test_threshold_bounds_the_probability_of_a_rejection(threshold, expected):
    """Survival of a chain at acceptance 1/2: 1/2, 1/4, 1/8; SpecDec++ stops at 1 - h."""
    world = World(ThresholdControl(policy="threshold", threshold=threshold))
    assert chain(world, 8).counts.tolist() == [expected]


def test_rows_are_capped_best_first():
    world = World(FixedControl(policy="fixed"), requests=2)
    world.controller.max_rows = 7
    assert chain(world, 16, 2).counts.tolist() == [3, 2]
    world.controller.max_rows = 2
    assert chain(world, 16, 2).counts.tolist() == [0, 0]


def test_nothing_is_drafted_before_the_step_is_profiled():
    world = World()
    world.controller.cost = None
    assert chain(world, 8).counts.tolist() == [0]


def test_predictions_and_measurements_are_counted():
    world = World()
    world.run(300, 0.8)
    c = world.counters
    assert c["timed_steps"] == c["control_steps"] == 300
    assert c["predicted_step_seconds"] == pytest.approx(c["measured_step_seconds"], rel=0.05)
    assert c["expected_tokens"] == pytest.approx(world.tokens - 300, rel=0.15)


def test_drawn_nodes_are_verified_whatever_they_are_worth():
    """What they cost shows in the next steps: those are not drafted."""
    source = Source("draft", "draft", 0.01)
    controller = Controller(GoodputControl(), [source], 6, 1 << 16, Counters(), draws=True)
    controller.cost = StepCost(CostProfile(CURVE))
    texts = np.zeros((1, 1000), np.int32)
    drafted = []
    for known in range(10, 60):
        step = StepContext(
            ["r"], texts, np.array([known], np.int32), np.array([6], np.int32),
            np.zeros(1, bool), NOTHING,
        )  # fmt: skip
        controller.prepare(step)
        drafted.append(bool(step.max_nodes[0]))
        if not drafted[-1]:
            continue
        # Three draws and two nodes that were looked up, the worst sort: all tokens are wrong.
        drafts = DraftBatch(
            np.full(5, 7, np.int32), np.array([-1, -1, 0, -1, 3], np.int32),
            np.array([5], np.int32), draft_probs="probs",
            drawn_from=np.array([0, 0, 1, -1, -1], np.int32),
        )  # fmt: skip
        chosen = controller.choose(step, drafts)
        assert chosen.drawn_from[:3].tolist() == [0, 0, 1]
        assert chosen.draft_probs == "probs"
        assert chosen.counts.tolist() == [len(chosen.tokens)]
    assert drafted[0]
    assert sum(drafted[1:]) <= 2  # probes


def chosen_of_a_tree(profile: CostProfile, drawn: bool = False) -> list[list[int]]:
    """Parents that the controller verifies, per request, of a tree and of a chain; the tree's
    best path is 0, 1, 3 and its second best child 2."""
    sources = [Source("best", "rank", 0.7), Source("second", "rank", 0.35)]
    controller = Controller(GoodputControl(), sources, 8, 1 << 16, Counters())
    controller.cost = StepCost(profile)
    step = StepContext(
        ["tree", "chain"], np.zeros((2, 100), np.int32), np.array([10, 10], np.int32),
        np.array([8, 8], np.int32), np.zeros(2, bool), NOTHING,
    )  # fmt: skip
    controller.prepare(step)
    drafts = DraftBatch(
        np.arange(7, dtype=np.int32), np.array([-1, 0, -1, 1, 2, -1, 0], np.int32),
        np.array([5, 2], np.int32), np.array([0, 0, 1, 0, 0, 0, 0], np.int32),
    )  # fmt: skip
    if drawn:
        drafts.draft_probs, drafts.drawn_from = "probs", np.zeros(7, np.int32)
    chosen = controller.choose(step, drafts)
    ends = np.cumsum(chosen.counts)
    return [
        chosen.parents[end - n : end].tolist() for end, n in zip(ends, chosen.counts, strict=True)
    ]


FREE_ROWS = CostCurve(np.array([1, 64]), np.array([0.0100, 0.0101]))
TWICE = CostCurve(FREE_ROWS.rows, 2 * FREE_ROWS.seconds)
TENFOLD = CostCurve(FREE_ROWS.rows, 10 * FREE_ROWS.seconds)


@pytest.mark.parametrize(
    ("profile", "verified"),
    [
        (CostProfile(FREE_ROWS), [[-1, 0, -1, 1, 2], [-1, 0]]),
        # The same rows at the same price, but as a tree: each request's best path.
        (CostProfile(FREE_ROWS, FREE_ROWS, TWICE), [[-1, 0, 1], [-1, 0]]),
        # Chains cost something too, and trees hardly more.
        (CostProfile(FREE_ROWS, CURVE, CURVE), [[-1, 0, -1, 1, 2], [-1, 0]]),
        (CostProfile(FREE_ROWS, TENFOLD, TENFOLD), [[], []]),
        (CostProfile(FREE_ROWS, TENFOLD), [[], []]),
    ],
)
def test_trees_that_are_dearer_than_chains_give_way_to_them(profile, verified):
    assert chosen_of_a_tree(profile) == verified


def test_drawn_trees_are_verified_as_trees_whatever_they_cost():
    dear = CostProfile(FREE_ROWS, FREE_ROWS, TENFOLD)
    assert chosen_of_a_tree(dear, drawn=True) == [[-1, 0, -1, 1, 2], [-1, 0]]


class LevelWorld:
    """``requests`` texts with a draft model: each level of ``LEVELS`` nodes is followed with
    probability ``acceptance`` given that the one above was; a pass of the draft takes
    ``pass_seconds``."""

    LEVELS = (2, 2, 2, 2)
    PARENTS = np.array([-1, -1, 0, 0, 2, 2, 4, 4], np.int32)

    def __init__(self, control=None, requests=1, pass_seconds=0.0, max_rows=1 << 16, curve=CURVE):
        self.counters = Counters()
        self.controller = Controller(
            control or GoodputControl(), [Source("level", "draft", 0.5)], sum(self.LEVELS),
            max_rows, self.counters, levels=self.LEVELS,
        )  # fmt: skip
        self.controller.cost = StepCost(CostProfile(curve))
        self.rng = np.random.default_rng(0)
        self.curve, self.pass_seconds = curve, pass_seconds
        self.texts = np.zeros((requests, 100_000), np.int32)
        self.known = np.full(requests, 10, np.int32)
        self.clock, self.tokens = 0.0, 0
        self.limit = np.full(requests, sum(self.LEVELS), np.int32)

    def step(self, acceptance) -> np.ndarray:
        """One step; int [R] nodes each request drafted."""
        requests = len(self.known)
        step = StepContext(
            [f"r{i}" for i in range(requests)], self.texts, self.known.copy(), self.limit.copy(),
            np.zeros(requests, bool), NOTHING,
        )  # fmt: skip
        self.controller.prepare(step)
        nodes = step.max_nodes.copy()
        depths = -(-nodes // 2)
        passes = int(depths.max()) + 1 if nodes.any() else 0
        self.controller.drafting_took(step.max_nodes, passes * self.pass_seconds)
        # Which tokens the nodes hold is nobody's business here.
        parents = np.concatenate([self.PARENTS[:count] for count in nodes])
        drafts = DraftBatch(np.zeros(nodes.sum(), np.int32), parents, nodes)
        assert self.controller.choose(step, drafts) is drafts
        right = self.rng.random((requests, 5)) < np.broadcast_to(acceptance, requests)[:, None]
        right[np.arange(requests), depths] = False
        gained = 1 + np.argmin(right, axis=1)
        self.known += gained.astype(np.int32)
        self.tokens += int(gained.sum())
        rows = requests + int(nodes.sum())
        seconds = float(self.curve(rows))
        shape = StepShape(requests, rows, 100 * requests, tree=bool(nodes.max() > 1))
        self.controller.step_took(shape, seconds)
        self.clock += seconds + passes * self.pass_seconds
        return nodes

    def run(self, steps, acceptance) -> np.ndarray:
        return np.array([self.step(acceptance) for _ in range(steps)])


@pytest.mark.parametrize("requests", [1, 5])
@pytest.mark.parametrize("pass_seconds", [0.0005, 0.002])
@pytest.mark.parametrize("acceptance", [0.0, 0.4, 0.9])
def test_planned_levels_are_close_to_perfect_knowledge(acceptance, pass_seconds, requests):
    world = LevelWorld(requests=requests, pass_seconds=pass_seconds)
    world.run(150, acceptance)
    clock, tokens = world.clock, world.tokens
    world.run(400, acceptance)
    depth = np.arange(5)
    expected = requests * np.array([sum(acceptance**i for i in range(d + 1)) for d in depth])
    passes = np.where(depth > 0, depth + 1, 0)
    best = np.max(expected / (CURVE(requests * (1 + 2 * depth)) + passes * pass_seconds))
    assert (world.tokens - tokens) / (world.clock - clock) > 0.95 * best


def test_a_lone_pause_is_not_the_price_of_a_pass():
    """Something is compiled, or recorded as a CUDA graph: no reason to stop drafting."""
    world = LevelWorld(pass_seconds=0.0005)
    world.run(50, 0.9)
    before = world.controller.prices.drafting.seconds
    world.pass_seconds = 0.5
    world.run(1, 0.9)
    assert world.controller.prices.drafting.seconds == before
    world.pass_seconds = 0.0005
    assert (world.run(50, 0.9) > 0).mean() > 0.9
    world.pass_seconds = 0.5  # and now for good
    world.run(2, 0.9)
    assert world.controller.prices.drafting.seconds > 10 * before


def test_planned_levels_come_back_after_a_drop():
    world = LevelWorld(pass_seconds=0.0005)
    high = world.run(200, 0.9)[-50:].mean()
    assert world.run(400, 0.0)[-200:].mean() < 0.3 * high
    assert world.run(600, 0.9)[-50:].mean() > 0.7 * high


def test_a_batch_is_probed_rarely_however_often_some_request_is_lucky():
    """A pass costs half a step of eight requests, and what it drafts is right now and then."""
    step = float(CURVE(8))
    world = LevelWorld(requests=8, pass_seconds=0.5 * step)
    world.run(100, 0.4)
    probes, clock, tokens = world.counters["probe_steps"], world.clock, world.tokens
    world.run(1000, 0.4)
    assert 2 <= world.counters["probe_steps"] - probes < 20
    assert (world.tokens - tokens) / (world.clock - clock) > 0.97 * 8 / step


def test_planned_levels_go_to_the_requests_that_follow_them():
    world = LevelWorld(requests=2, pass_seconds=0.001)
    nodes = world.run(300, [0.95, 0.05])[-100:].mean(0)
    assert nodes[0] > 2 * nodes[1]


def test_levels_of_one_node_are_priced_as_chains():
    """Wide levels make trees, which here never pay; the lone first one does."""
    dear = CostProfile(FREE_ROWS, FREE_ROWS, TENFOLD)
    for sizes, depth in [((1, 1, 2), 2), ((2, 2, 2), 0), ((1, 1, 1), 3)]:
        source = Source("level", "draft", 0.8)
        controller = Controller(
            GoodputControl(), [source], sum(sizes), 1 << 16, Counters(), levels=sizes
        )
        controller.cost = StepCost(dear)
        step = StepContext(
            ["r"], np.zeros((1, 100), np.int32), np.array([10], np.int32),
            np.array([sum(sizes)], np.int32), np.zeros(1, bool), NOTHING,
        )  # fmt: skip
        controller.prepare(step)
        assert step.max_nodes.tolist() == [sum(sizes[:depth])]


def test_planned_trees_keep_every_limit():
    fixed = FixedControl(policy="fixed")
    world = LevelWorld(fixed, requests=3)
    world.limit[:] = [8, 3, 0]
    assert world.step(0.5).tolist() == [8, 3, 0]
    world = LevelWorld(fixed, requests=3, max_rows=3 + 11)
    assert world.step(0.5).tolist() == [8, 3, 0]
    world = LevelWorld(ThresholdControl(policy="threshold", threshold=0.7))
    # The prior is 0.5 per level: a rejection on the way has probability 0.5, 0.75, ...
    assert world.step(0.5).tolist() == [2]


def test_what_was_drafted_for_a_request_says_nothing_about_the_next_of_its_name():
    """A request id comes again: a turn of a session, or another request after an abort."""
    labelled = []
    for forgotten in (False, True):
        world = World(FixedControl(policy="fixed"), requests=2)
        world.step(0.5)
        if forgotten:
            world.controller.forget("r0")
        world.step(0.5)
        labelled.append(world.counters.as_dict()["nodes_labelled"])
    assert labelled[1] <= labelled[0] - 1
    world = World(FixedControl(policy="fixed"))
    world.step(0.5)
    world.controller.forget("r0")
    world.step(0.5)
    assert world.counters.as_dict()["nodes_labelled"] == 0


def test_how_much_pays_for_one_salt_says_nothing_to_another():
    """A new request may draft as much as the luckiest of its own salt got, or as ever."""
    world, seen = World(FixedControl(policy="fixed"), requests=2), []
    controller = world.controller
    controller._policy.limit = lambda step, most: seen.append(most.tolist())

    def step(names, salts):
        known, most = np.full(2, 10, np.int32), np.full(2, MAX_NODES, np.int32)
        out = StepContext(names, world.texts, known, most, np.zeros(2, bool), NOTHING)
        out.cache_salts = salts
        controller.prepare(out)
        return out

    chains = [5, 6, 7, 8, 9, 5], [-1, 0, 1, 2, 3, -1], [5, 1]
    drafts = DraftBatch(*(np.array(each, np.int32) for each in chains))
    controller.choose(step(["r0", "r1"], ["a", "b"]), drafts)
    step(["r2", "r3"], ["b", "c"])
    assert seen == [[MAX_NODES, MAX_NODES], [1, MAX_NODES]]


def test_errors_of_predictions_are_classed():
    world = World()
    world.run(300, 0.7)
    classes = {
        name.partition(":")[2]: count
        for name, count in world.counters.as_dict().items()
        if name.startswith("step_errors:")
    }
    assert sum(classes.values()) == world.counters["timed_steps"] == 300
    assert classes["5%"] > 200  # the world's noise has a deviation of 3 %
    before = dict(classes)
    world.controller.step_took(StepShape(1, 1, 100), 5 * float(CURVE(1)))
    assert world.counters["step_errors:more"] == before["more"] + 1


@pytest.mark.parametrize(
    "control",
    [
        GoodputControl(),
        GoodputControl(objective="throughput"),
        GoodputControl(objective="slo", tpot_ms=20.0),
        FixedControl(policy="fixed"),
    ],
)
def test_nothing_of_a_request_stays(control):
    world = World(control, requests=2)
    world.run(5, 0.7)
    slots = world.controller._ledger._slots
    assert (slots.find(world.names) >= 0).all()
    for name in world.names:
        world.controller.forget(name)
    assert (slots.find(world.names) == -1).all()
