"""Bayesian optimisation over the unit cube: a Gaussian process, and what to try next by it.

SWIFT (arXiv 2410.06916) and Draft & Verify (arXiv 2309.08168) search the layers that a draft leaves
out by the package ``bayesian-optimization``: Matern's kernel of smoothness 5/2, observation noise,
an upper confidence bound. Theirs brings scikit-learn into a server, for a Cholesky factor and two
triangular solves; so here is what of it is used.
"""

from __future__ import annotations

import numpy as np

#: Standard deviations above the mean (SWIFT), and the noise of observations whose variance is 1.
KAPPA, NOISE = 2.5, 1e-2
#: Newest observations that are learnt from: a factor takes their number cubed.
MOST = 256
#: Points among which the best is looked for: anywhere, and near the best one so far.
ANYWHERE, NEAR = 384, 128
#: Length scales that are tried, in units of the cube's diagonal.
SCALES = (0.05, 0.1, 0.2, 0.4, 0.8)


def matern(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
    """The kernel (smoothness 5/2) between the rows of ``a`` [n, d] and of ``b`` [m, d]: [n, m]."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    far = np.sqrt(5 * np.maximum(squares, 0)) / length
    return (1 + far + far**2 / 3) * np.exp(-far)


class GaussianProcess:
    """What ``values`` float64 [n] at ``points`` float64 [n, d], n >= 2, say of others."""

    def __init__(self, points: np.ndarray, values: np.ndarray):
        self._points = points
        self._mean, self._scale = float(values.mean()), float(values.std()) or 1.0
        normal = (values - self._mean) / self._scale
        fits = [self._fit(normal, scale * points.shape[1] ** 0.5) for scale in SCALES]
        _, self._length, self._factor, self._weights = max(fits, key=lambda fit: fit[0])

    def _fit(
        self, normal: np.ndarray, length: float
    ) -> tuple[float, float, np.ndarray, np.ndarray]:
        """Log marginal likelihood at a ``length`` scale, that, the Cholesky factor, and K^-1 y."""
        kernel = matern(self._points, self._points, length)
        factor = np.linalg.cholesky(kernel + NOISE * np.eye(len(normal)))
        weights = np.linalg.solve(factor.T, np.linalg.solve(factor, normal))
        likelihood = -0.5 * normal @ weights - np.log(np.diag(factor)).sum()
        return float(likelihood), length, factor, weights

    def at(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, float64 [m] each, at ``points`` float64 [m, d]."""
        kernel = matern(points, self._points, self._length)
        mean = kernel @ self._weights
        variance = 1 - (np.linalg.solve(self._factor, kernel.T) ** 2).sum(0)
        return (
            self._mean + self._scale * mean,
            self._scale * np.sqrt(np.maximum(variance, 0)),
        )


class Bayes:
    """A search for the point of [0, 1]^d with the highest value."""

    def __init__(self, size: int, seed: int = 0):
        """``size``: d."""
        self._size, self._rng = size, np.random.default_rng(seed)
        self.points: list[np.ndarray] = []
        self.values: list[float] = []

    def tell(self, point: np.ndarray, value: float) -> None:
        """The value of a point float64 [d], measured with noise."""
        self.points.append(point)
        self.values.append(value)

    def propose(self) -> np.ndarray:
        """The point float64 [d] that is worth trying next: of some drawn ones, that of the highest
        upper confidence bound."""
        drawn = self._rng.random((ANYWHERE, self._size))
        if len(self.values) < 2:
            return drawn[0]
        points, values = np.array(self.points[-MOST:]), np.array(self.values[-MOST:])
        near = points[values.argmax()] + self._rng.normal(0, 0.25, (NEAR, self._size))
        drawn = np.concatenate((drawn, near.clip(0, 1)))
        mean, deviation = GaussianProcess(points, values).at(drawn)
        return drawn[(mean + KAPPA * deviation).argmax()]
