from __future__ import annotations

import numpy as np
import pytest

from vllm_specplus.control.confidence import (
    INITIAL_INTERCEPT,
    INITIAL_SLOPE,
    L2,
    ConfidenceEstimator,
    arrowhead_first,
    arrowhead_rest,
    log_odds,
    normal_equations,
)


def logistic(x):
    return 1 / (1 + np.exp(-x))


def systematic_labels(probability):
    """Labels whose running sum follows the probabilities' within 1/2: no sampling noise.

    (Of 1000 independent labels, an intercept of -.1 is known to +-.07 at best.)
    """
    total = np.floor(np.cumsum(probability) + 0.5)
    return np.diff(total, prepend=0.0).astype(bool)


def traffic(n, slope, intercepts, seed):
    """(confidence, depth, accepted) of n nodes that follow the model, in random order."""
    rng = np.random.default_rng(seed)
    depth = np.sort(np.resize(np.arange(1, len(intercepts) + 1), n)).astype(np.int32)
    feature = rng.normal(0.0, 2.0, n)
    accepted = np.zeros(n, bool)
    for d, intercept in enumerate(intercepts, 1):
        at = np.flatnonzero(depth == d)
        at = at[np.argsort(feature[at])]
        accepted[at] = systematic_labels(logistic(slope * feature[at] + intercept))
    order = rng.permutation(n)
    return logistic(feature[order]).astype(np.float32), depth[order], accepted[order]


def feed(estimator, confidence, depth, accepted, calls):
    for part in np.array_split(np.arange(len(depth)), calls):
        estimator.observe(confidence[part], depth[part], accepted[part])


@pytest.mark.parametrize("seed", range(3))
def test_recovers_the_model_behind_5000_labels(seed):
    intercepts = -0.1 * np.arange(1, 6)
    estimator = ConfidenceEstimator(5, window=5000)
    feed(estimator, *traffic(5000, 1.2, intercepts, seed), calls=500)
    assert estimator.slope == pytest.approx(1.2, rel=0.05)
    np.testing.assert_allclose(estimator.intercepts, intercepts, rtol=0.05)


def sample(seed, n=60, k=4):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(0, 2, n),
        rng.integers(0, k, n),
        rng.integers(0, 2, n).astype(float),
        rng.uniform(0, 2),
        rng.normal(0, 1, k),
    )


def objective(feature, level, accepted, slope, intercepts):
    """The penalised log-likelihood, from its definition."""
    p = logistic(slope * feature + intercepts[level])
    likelihood = np.sum(accepted * np.log(p) + (1 - accepted) * np.log(1 - p))
    pull = (slope - INITIAL_SLOPE) ** 2 + np.sum((intercepts - INITIAL_INTERCEPT) ** 2)
    return likelihood - L2 / 2 * pull


def dense(corner, border, diagonal):
    matrix = np.diag(np.r_[corner, diagonal])
    matrix[0, 1:] = matrix[1:, 0] = border
    return matrix


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("labels", [60, 0])
def test_gradient_and_curvature_equal_finite_differences(seed, labels):
    feature, level, accepted, slope, intercepts = sample(seed, labels)
    theta, h = np.r_[slope, intercepts], 1e-5

    def value(t):
        return objective(feature, level, accepted, t[0], t[1:])

    def gradient(t):
        *_, first, rest = normal_equations(feature, level, accepted, t[0], t[1:])
        return np.r_[first, rest]

    steps = h * np.eye(len(theta))
    numeric = [(value(theta + s) - value(theta - s)) / (2 * h) for s in steps]
    np.testing.assert_allclose(gradient(theta), numeric, rtol=1e-6, atol=1e-8)
    hessian = [(gradient(theta + s) - gradient(theta - s)) / (2 * h) for s in steps]
    corner, border, diagonal, *_ = normal_equations(feature, level, accepted, slope, intercepts)
    np.testing.assert_allclose(-dense(corner, border, diagonal), hessian, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_arrowhead_solution_equals_the_dense_one(seed):
    corner, border, diagonal, rhs_first, rhs = normal_equations(*sample(seed))
    first = arrowhead_first(corner, border, diagonal, rhs_first, rhs)
    rest = arrowhead_rest(border, diagonal, rhs, first)
    expected = np.linalg.solve(dense(corner, border, diagonal), np.r_[rhs_first, rhs])
    np.testing.assert_allclose(np.r_[first, rest], expected, rtol=1e-9)


def test_predicts_by_confidence_and_depth():
    estimator = ConfidenceEstimator(2)
    estimator.slope, estimator.intercepts = 2.0, np.array([0.5, -1.0])
    # logit(.8) = log 4
    p = estimator.predict(np.array([0.8, 0.8, 0.5], np.float32), np.array([1, 2, 1], np.int32))
    assert p.dtype == np.float32
    np.testing.assert_allclose(p, logistic(np.array([2 * np.log(4) + 0.5, 2 * np.log(4) - 1, 0.5])))


def test_extreme_confidences_are_clamped():
    confidence = np.array([0.0, 1.0, np.nextafter(np.float32(1), np.float32(2)), np.nan])
    assert log_odds(confidence).tolist() == [-40.0, 40.0, 40.0, -40.0]
    estimator = ConfidenceEstimator(1)
    estimator.slope = 50.0  # +-2000 log-odds: exp would overflow
    with np.errstate(all="raise"):
        assert estimator.predict(confidence[:2], np.ones(2, np.int32)).tolist() == [0.0, 1.0]


def test_refits_at_every_hundredth_call():
    estimator = ConfidenceEstimator(1)
    slopes = []
    for _ in range(200):
        estimator.observe(np.array([0.9, 0.3]), np.array([1, 1]), np.array([True, False]))
        slopes.append(estimator.slope)
    assert (np.flatnonzero(np.diff(slopes, prepend=INITIAL_SLOPE)) + 1).tolist() == [100, 200]


def test_nothing_moves_without_labels():
    estimator = ConfidenceEstimator(3)
    none = np.empty(0)
    for _ in range(100):
        estimator.observe(none, none, none)
    assert estimator.slope == INITIAL_SLOPE
    assert estimator.intercepts.tolist() == [INITIAL_INTERCEPT] * 3
    assert estimator.predict(none, none).shape == (0,)


def test_refits_without_new_labels_change_nothing():
    estimator = ConfidenceEstimator(1)
    estimator.observe(np.full(3, 0.5), np.ones(3), np.ones(3))
    estimator.refit()
    after = estimator.slope, estimator.intercepts.tolist()
    # n = 3 labels of f = 0 and a Newton step of more than 1: 3/53 of 1.
    assert after == (INITIAL_SLOPE, [pytest.approx(INITIAL_INTERCEPT + 3 / 53)])
    estimator.observe([0.9], [1], [True])
    estimator.refit()
    after = estimator.slope, estimator.intercepts.tolist()
    assert after[0] != INITIAL_SLOPE
    estimator.refit()
    assert (estimator.slope, estimator.intercepts.tolist()) == after


def test_a_depth_never_observed_keeps_its_intercept():
    estimator = ConfidenceEstimator(3)
    confidence, depth, accepted = traffic(2000, 1.2, [1.0, 0.5], seed=0)
    feed(estimator, confidence, np.where(depth == 2, 3, depth), accepted, calls=500)
    assert estimator.intercepts[1] == INITIAL_INTERCEPT
    np.testing.assert_allclose(estimator.intercepts[[0, 2]], [1.0, 0.5], rtol=0.1)


def test_slope_never_gets_negative():
    estimator = ConfidenceEstimator(1)
    confidence, depth, accepted = traffic(2000, 1.2, [0.0], seed=0)
    feed(estimator, confidence, depth, ~accepted, calls=500)
    assert estimator.slope == 0.0
    # What is left is the mean.
    assert estimator.predict([0.5], [1])[0] == pytest.approx(1 - accepted.mean(), abs=0.01)


def test_intercepts_make_up_for_the_slopes_real_step():
    """The full step would take the slope below 0; cut there, the intercepts' rows change."""
    confidence, depth, accepted = traffic(2000, 1.2, [0.0, 0.5], seed=0)
    start = np.full(2, INITIAL_INTERCEPT)
    _, border, diagonal, _, gradient = normal_equations(
        log_odds(confidence), depth - 1, ~accepted, INITIAL_SLOPE, start
    )
    estimator = ConfidenceEstimator(2)
    estimator.observe(confidence, depth, ~accepted)
    estimator.refit()
    assert estimator.slope == 0.0
    steps = (gradient + border * INITIAL_SLOPE) / diagonal
    np.testing.assert_allclose(estimator.intercepts, start + 1000 / 1050 * steps, rtol=1e-9)


def test_old_traffic_is_forgotten():
    estimator = ConfidenceEstimator(2, window=1000)
    feed(estimator, *traffic(3000, 0.3, [-2.0, -2.0], seed=0), calls=500)
    assert estimator.predict([0.5], [1])[0] < 0.2
    for seed in (1, 2):  # the window is replaced twice
        feed(estimator, *traffic(1000, 1.5, [1.0, 1.0], seed), calls=500)
    assert estimator.slope == pytest.approx(1.5, rel=0.05)
    np.testing.assert_allclose(estimator.intercepts, 1.0, rtol=0.05)


def test_one_call_larger_than_the_window_keeps_its_newest():
    rng = np.random.default_rng(0)
    confidence, accepted = rng.random(25), rng.random(25) < 0.5
    depth = rng.integers(1, 3, 25)
    whole, parts = ConfidenceEstimator(2, window=10), ConfidenceEstimator(2, window=10)
    whole.observe(confidence, depth, accepted)
    feed(parts, confidence, depth, accepted, calls=9)
    whole.refit()
    parts.refit()
    assert whole.slope == pytest.approx(parts.slope, rel=1e-12)
    np.testing.assert_allclose(whole.intercepts, parts.intercepts, rtol=1e-12)
    # The first 15 left no trace.
    other = ConfidenceEstimator(2, window=100)
    other.observe(confidence[15:], depth[15:], accepted[15:])
    other.refit()
    assert other.slope == pytest.approx(whole.slope, rel=1e-12)
    np.testing.assert_allclose(other.intercepts, whole.intercepts, rtol=1e-12)


def test_one_surprise_at_full_confidence_moves_little():
    """p saturates there: the raw Newton step would be hundreds of log-odds."""
    estimator = ConfidenceEstimator(1)
    estimator.observe([1.0], [1], [False])
    estimator.refit()
    assert 0 < INITIAL_SLOPE - estimator.slope < 0.03
    assert 0 < INITIAL_INTERCEPT - estimator.intercepts[0] < 0.03


def test_overconfident_draft_is_calibrated():
    """Confidence always 1, 9 of 10 accepted: from sigmoid(19.8) to .9."""
    estimator = ConfidenceEstimator(1)
    accepted = np.arange(2000) % 10 > 0
    feed(estimator, np.ones(2000), np.ones(2000, np.int32), accepted, calls=1000)
    assert estimator.predict([1.0], [1])[0] == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(
    ("confidence", "depth", "message"),
    [
        ([0.5], [0], r"depth must be in 1\.\.4, not 0\.\.0"),
        ([0.5, 0.5], [1, 5], r"depth must be in 1\.\.4, not 1\.\.5"),
        ([0.5], [1, 2], r"vectors of one length, not of shapes \(1,\) and \(2,\)"),
        (0.5, 1, r"vectors of one length, not of shapes \(\) and \(\)"),
    ],
)
def test_bad_nodes_are_refused(confidence, depth, message):
    estimator = ConfidenceEstimator(4)
    with pytest.raises(ValueError, match=message):
        estimator.predict(confidence, depth)
    with pytest.raises(ValueError, match=message):
        estimator.observe(confidence, depth, [True])


def test_labels_must_match_the_nodes():
    with pytest.raises(ValueError, match=r"2 nodes, but accepted has shape \(1,\)"):
        ConfidenceEstimator(4).observe([0.5, 0.5], [1, 2], [True])


@pytest.mark.parametrize("arguments", [(0,), (4, 0)])
def test_sizes_must_be_positive(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        ConfidenceEstimator(*arguments)
