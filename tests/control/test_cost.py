"""Step cost: the profiled curve, its file, and the correction by real steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_specplus.control.cost import (
    PROFILE_ROWS,
    CostCurve,
    CostProfile,
    StepCost,
    StepKind,
    StepShape,
)

CURVE = CostCurve(np.array([1, 8, 16, 64]), np.array([0.010, 0.010, 0.012, 0.036]))
#: Three times as dear.
DEAR = CostCurve(np.array([1, 8, 64]), np.array([0.030, 0.030, 0.108]))
KEY = {"model": "m", "dtype": "bfloat16", "tensor_parallel_size": 1}


def test_profiled_counts_show_where_tiles_end():
    """Tiles of 6 rows, as of a CPU without matrix instructions: a 7th row is dear, the others
    free. Interpolated from 4 to 8, rows 5 and 6 would seem to cost what the 7th does."""
    rows = np.array(PROFILE_ROWS)
    curve = CostCurve.fit(rows, np.ceil(rows / 6)[None])
    small = np.arange(1, 34)
    assert curve(small) == pytest.approx(np.ceil(small / 6))


def test_curve_is_linear_between_points_and_beyond():
    assert CURVE(np.array([1, 4, 12, 64])) == pytest.approx([0.010, 0.010, 0.011, 0.036])
    assert CURVE.slope == pytest.approx(0.024 / 48)
    assert CURVE(np.array([128]))[0] == pytest.approx(0.036 + 64 * 0.024 / 48)


def test_fit_takes_the_fastest_and_never_falls():
    """Disturbances only add time: a count is never slower than a larger one."""
    rounds = np.array([[0.9, 0.012, 0.5], [0.010, 0.8, 0.011], [0.020, 0.013, 0.012]])
    curve = CostCurve.fit(np.array([1, 2, 4]), rounds)
    assert curve.seconds == pytest.approx([0.010, 0.011, 0.011])


def test_a_fall_that_is_no_disturbance_is_kept():
    """As measured: two rows 32.2 ms, six 27.0."""
    curve = CostCurve.fit(np.array([1, 2, 6, 7]), np.array([[0.0307, 0.0322, 0.0270, 0.0307]] * 3))
    assert curve.seconds == pytest.approx([0.0307, 0.0322, 0.0270, 0.0307])


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [([1], [0.1]), ([1, 1], [0.1, 0.2]), ([2, 1], [0.1, 0.2]), ([1, 2], [0.1]),
     ([1, 2], [0.1, 0.0]), ([1, 2], [0.1, float("nan")])],
)  # fmt: skip
def test_impossible_curves_are_refused(rows, seconds):
    with pytest.raises(ValueError, match="a cost curve needs"):
        CostCurve(np.array(rows), np.array(seconds))


def test_file_round_trip(tmp_path):
    CostProfile(CURVE, tree=DEAR).save(tmp_path / "cost.json", KEY)
    again = CostProfile.load(tmp_path / "cost.json", KEY)
    assert again.plain.rows.tolist() == CURVE.rows.tolist()
    assert again.plain.seconds == pytest.approx(CURVE.seconds)
    assert again.chain is None
    assert again.tree.rows.tolist() == DEAR.rows.tolist()
    assert again.tree.seconds == pytest.approx(DEAR.seconds)
    assert [p.name for p in tmp_path.iterdir()] == ["cost.json"]


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "cost.json"
    CostProfile(CURVE).save(path, KEY)
    with pytest.raises(ValueError, match=r"dtype: 'bfloat16', here 'float32'.*delete it"):
        CostProfile.load(path, KEY | {"dtype": "float32"})
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a cost file"):
        CostProfile.load(path, KEY)
    path.write_text("{nonsense")
    with pytest.raises(ValueError, match="is no JSON"):
        CostProfile.load(path, KEY)
    CostProfile(CURVE).save(path, KEY)
    whole = json.loads(path.read_text())
    seconds = {"plain": whole["curves"]["plain"] | {"seconds": [1.0, "x"]}}
    for curves in (seconds, {"bush": whole["curves"]["plain"]}, {}, None):
        path.write_text(json.dumps(whole | {"curves": curves}))
        with pytest.raises(ValueError, match="is damaged"):
            CostProfile.load(path, KEY)


def test_a_file_of_another_version_says_so(tmp_path):
    path = tmp_path / "cost.json"
    old = {"format": "vllm-specplus step cost 1", "key": KEY, "rows": [1, 2], "seconds": [1, 2]}
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"another version of vllm-specplus.*: delete it to"):
        CostProfile.load(path, KEY)


def test_a_kind_that_was_not_measured_costs_what_the_next_simpler_one_does():
    whole = CostProfile(CURVE, CURVE, DEAR)
    assert [whole.curve(kind) for kind in StepKind] == [CURVE, CURVE, DEAR]
    assert CostProfile(CURVE).curve(StepKind.TREE) is CURVE
    assert CostProfile(CURVE, DEAR).curve(StepKind.TREE) is DEAR
    assert CostProfile(CURVE, tree=DEAR).curve(StepKind.CHAIN) is CURVE


def test_each_kind_of_step_has_its_price():
    chain = CostCurve(CURVE.rows, 1.5 * CURVE.seconds)
    cost = StepCost(CostProfile(CURVE, chain, DEAR))
    seconds = cost.predict(np.array([4, 8, 8]), 4, 100, tree=np.array([True, False, True]))
    shapes = (
        StepShape(4, 4, 100, tree=True),
        StepShape(4, 8, 100),
        StepShape(4, 8, 100, tree=True),
    )
    assert [shape.kind for shape in shapes] == list(StepKind)
    assert seconds == pytest.approx([cost.predict_step(shape) for shape in shapes])
    assert seconds[1] - seconds[0] == pytest.approx(0.005, rel=0.1)
    assert seconds[2] - seconds[1] == pytest.approx(0.015, rel=0.01)


def test_what_trees_cost_beside_chains_is_kept_while_the_machine_changes():
    """Only chains are run meanwhile: trees must not seem cheap, or dear, for that."""
    cost = StepCost(CostProfile(CURVE, tree=DEAR))
    chain, tree = StepShape(1, 8, 100), StepShape(1, 8, 100, tree=True)
    for factor in (1.0, 2.0, 0.7):
        for _ in range(200):
            cost.observe(chain, factor * 0.012)
        assert cost.predict_step(chain) == pytest.approx(factor * 0.012, rel=0.1)
        # Above the price of a chain; below what the profile says, all of it scaled.
        assert 1.6 < cost.predict_step(tree) / cost.predict_step(chain) < 3.2


def truth(shape: StepShape) -> float:
    """A machine with host work per step and request, and attention over the context."""
    seconds = 1.1 * float(CURVE(shape.rows)) + 0.002 + 0.0004 * shape.requests
    return seconds + 2e-7 * shape.context + 0.0001 * shape.prompt_rows


def random_shape(rng) -> StepShape:
    requests = int(rng.integers(1, 9))
    rows = requests * int(rng.integers(1, 9))
    return StepShape(requests, rows, requests * int(rng.integers(50, 1500)))


def test_the_model_learns_what_the_profile_does_not_know():
    rng, cost = np.random.default_rng(0), StepCost(CostProfile(CURVE))
    for _ in range(400):
        shape = random_shape(rng)
        cost.observe(shape, truth(shape) * (1 + 0.05 * rng.standard_normal()))
    for _ in range(50):
        shape = random_shape(rng)
        assert cost.predict_step(shape) == pytest.approx(truth(shape), rel=0.08)


def test_unexcited_directions_keep_the_profile():
    """Single requests only, always undrafted: the price of rows stays the profiled one."""
    cost = StepCost(CostProfile(CURVE))
    shape = StepShape(1, 1, 300)
    for _ in range(2000):
        cost.observe(shape, 0.015)
    assert cost.predict_step(shape) == pytest.approx(0.015, rel=0.02)
    rows = np.array([16, 64])
    rise = float(np.diff(cost.predict(rows, 1, 300))[0])
    assert rise == pytest.approx(0.024, rel=0.35)


def test_a_machine_that_becomes_slower_is_noticed():
    cost, shape = StepCost(CostProfile(CURVE)), StepShape(1, 8, 100)
    for _ in range(200):
        cost.observe(shape, 0.012)
    for _ in range(150):
        cost.observe(shape, 0.024)
    assert cost.predict_step(shape) == pytest.approx(0.024, rel=0.1)


def test_a_rare_kind_of_step_is_remembered():
    """What speculation saves is measured against undrafted steps, however long ago."""
    plain, drafted = StepShape(4, 4, 400), StepShape(4, 12, 400)
    cost = StepCost(CostProfile(CURVE))
    for _ in range(20):
        cost.observe(plain, 0.020)
    for _ in range(500):
        cost.observe(drafted, 0.030)
    assert cost.predict_step(plain) == pytest.approx(0.020, rel=0.05)
    assert cost.predict_step(drafted) == pytest.approx(0.030, rel=0.05)


def test_one_pause_is_not_a_price():
    cost, shape = StepCost(CostProfile(CURVE)), StepShape(1, 8, 100)
    for _ in range(200):
        cost.observe(shape, 0.012)
    cost.observe(shape, 0.2)
    assert cost.predict_step(shape) == pytest.approx(0.012, rel=0.1)


def test_a_stopped_process_teaches_nothing():
    cost, shape = StepCost(CostProfile(CURVE)), StepShape(1, 8, 100)
    for _ in range(200):
        cost.observe(shape, 0.012)
    before = cost.predict_step(shape)
    assert cost.observe(shape, 30.0) is None
    assert cost.predict_step(shape) == before


def test_more_rows_are_never_predicted_to_be_faster():
    """Whatever noise says: else the budget would run away."""
    rng, cost = np.random.default_rng(1), StepCost(CostProfile(CURVE))
    for _ in range(300):
        rows = int(rng.integers(1, 9))
        cost.observe(StepShape(1, rows, 100), 0.02 - 0.001 * rows)
        seconds = cost.predict(np.arange(1, 80), 1, 100)
        assert (np.diff(seconds) >= -1e-12).all()


def test_a_coefficient_on_its_floor_leaves_no_bias():
    """Where drafts, requests and context cost less than nothing, what remains still fits."""
    cost = StepCost(CostProfile(CURVE))
    rng = np.random.default_rng(1)
    undrafted = StepShape(requests=16, rows=16, context=4000)
    for _ in range(128):
        requests = int(rng.integers(1, 17))
        context = int(rng.integers(100, 500)) * requests
        for rows in (requests, requests + int(rng.integers(1, 40))):
            falling = 0.02 - 1e-7 * context - 2e-4 * requests
            cost.observe(StepShape(requests, rows, context), falling)
    assert cost.theta[3] == 0  # context
    errors = []
    for _ in range(200):
        errors.append(cost.observe(undrafted, 0.0164) / 0.0164 - 1)
    assert abs(np.mean(errors[-64:])) < 0.02


def test_nodes_of_long_contexts_cost_more():
    """A drafted row attends to its request's context: 0.4 ms per 1000 tokens here."""
    cost, rng = StepCost(CostProfile(CURVE)), np.random.default_rng(2)

    def seconds(shape: StepShape) -> float:
        nodes = shape.rows - shape.requests
        return float(CURVE(shape.rows)) + 4e-4 * nodes * shape.context / shape.requests / 1000

    for _ in range(300):
        requests = int(rng.integers(4, 9))
        context = int(rng.choice([200, 1000])) * requests
        shape = StepShape(requests, requests + int(rng.choice([0, 8, 24])), context)
        cost.observe(shape, seconds(shape))
    for context in (200, 600, 1500):
        shape = StepShape(8, 8 + 20, 8 * context)
        assert cost.predict_step(shape) == pytest.approx(seconds(shape), rel=0.06)


@given(
    st.integers(1, 80), st.integers(0, 700), st.integers(1, 100_000), st.integers(0, 3000),
    st.booleans(), st.lists(st.floats(0.01, 2.0), min_size=8, max_size=8),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_one_step_is_predicted_as_many_are(requests, nodes, context, prompt_rows, tree, theta):
    cost = StepCost(CostProfile(CostCurve(np.array([1, 8, 64]), np.array([0.01, 0.012, 0.03]))))
    cost.theta = np.array(theta)
    shape = StepShape(requests, requests + nodes, context, prompt_rows, tree)
    many = cost.predict(np.array([shape.rows]), requests, context, prompt_rows, tree)
    assert cost.predict_step(shape) == pytest.approx(float(many[0]))
