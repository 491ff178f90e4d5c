"""The Gaussian process against its formulas, and the search against planted maxima."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vllm_specplus.drafting.bayes import NOISE, Bayes, GaussianProcess, matern


def test_the_kernel_is_materns():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 4)), rng.random((5, 4))
    for i, j in np.ndindex(3, 5):
        far = math.sqrt(5) * math.dist(a[i], b[j]) / 0.7
        expected = (1 + far + far**2 / 3) * math.exp(-far)
        assert matern(a, b, 0.7)[i, j] == pytest.approx(expected)


def test_mean_and_deviation_are_those_of_the_inverse():
    rng = np.random.default_rng(1)
    points, others = rng.random((9, 3)), rng.random((4, 3))
    values = np.sin(points.sum(1)) + 5
    process = GaussianProcess(points, values)
    length = process._length
    inverse = np.linalg.inv(matern(points, points, length) + NOISE * np.eye(9))
    normal = (values - values.mean()) / values.std()
    cross = matern(others, points, length)
    mean = values.mean() + values.std() * cross @ inverse @ normal
    variance = 1 - np.einsum("ij,jk,ik->i", cross, inverse, cross)
    found_mean, found_deviation = process.at(others)
    np.testing.assert_allclose(found_mean, mean)
    np.testing.assert_allclose(found_deviation, values.std() * np.sqrt(variance), rtol=1e-6)


def test_equal_values_are_no_fault():
    mean, deviation = GaussianProcess(np.eye(3), np.full(3, 2.0)).at(np.zeros((1, 3)))
    assert mean[0] == pytest.approx(2.0)
    assert deviation[0] > 0


def test_it_comes_nearer_than_chance():
    """A bowl in four dimensions, against as many points drawn at random."""
    best = np.array([0.2, 0.8, 0.5, 0.9])

    def value(point: np.ndarray) -> float:
        return -float(((point - best) ** 2).sum())

    search = Bayes(4)
    for _ in range(40):
        point = search.propose()
        assert ((point >= 0) & (point <= 1)).all()
        search.tell(point, value(point))
    drawn = np.random.default_rng(5).random((40, 4))
    assert max(search.values) > max(value(point) for point in drawn)
    assert max(search.values) > -0.05
