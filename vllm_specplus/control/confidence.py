"""How likely a draft node is accepted, learned from the traffic while serving.

One logistic model for all requests, as in vLLM's adaptive verification
(``vllm/v1/worker/gpu/spec_decode/acceptance_estimator.py`` in 0.32):

    P(accepted | parent accepted) = sigmoid(slope * f + intercept[depth])
    f = logit(confidence), clamped to +-40

``confidence`` is max_x q(x), q being the draft's distribution at the node's *parent*,
scaled by the request's temperature (greedy requests: temperature 1, else it is always 1).

It must be a function of that distribution, never q(d) of the token d that was drawn from
it. Rejection sampling is lossless because d ~ q; dropping nodes for a low q(d) leaves
tokens that follow another distribution than the q they are tested with, and the output
leans towards the draft's favourites. max_x q(x) is fixed before d is drawn, so a rule on it
cuts the draft at a place that does not depend on d. For greedy (one-hot) drafts d is itself
a function of the distribution, and both are safe.

NumPy only; nothing here knows vLLM.
"""

from __future__ import annotations

import numpy as np

MAX_LOGIT = 40.0
INITIAL_SLOPE = 0.5
INITIAL_INTERCEPT = -0.2
REFIT_INTERVAL = 100
"""Calls of :meth:`ConfidenceEstimator.observe` between two refits."""
DAMPING = 50.0
"""Labels: a parameter with this many in the window makes half of its Newton step."""
L2 = 1e-3
"""Pull towards the initial values, per unit of log-odds: what is known of most drafts
(vLLM's medians over five models) is a better default than a slope of 0."""
MAX_STEP = 1.0
"""Longest Newton step of a parameter, before damping. Where p saturates (one rejection
at confidence 1) the curvature vanishes, and the raw step is in the hundreds."""


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)  # exp(-x) would overflow


def log_odds(confidence: np.ndarray) -> np.ndarray:
    """float64 [N] the feature f of ``confidence`` [N].

    NaN (a draft whose logits overflowed) counts as 0, the least confidence, and softmax's
    rounding beyond 1 as 1: a bad draft costs time, it must not stop the engine.
    """
    q = np.clip(np.nan_to_num(np.asarray(confidence, np.float64), nan=0.0), 0.0, 1.0)
    with np.errstate(divide="ignore"):  # 0 and 1: infinite, clamped
        return np.clip(np.log(q) - np.log1p(-q), -MAX_LOGIT, MAX_LOGIT)


def normal_equations(feature, level, accepted, slope, intercepts):
    """Newton's system for the penalised log-likelihood of N labels.

    ``feature`` float64 [N]; ``level`` int [N], depth - 1; ``accepted`` [N] of 0 or 1;
    ``slope`` float, ``intercepts`` float64 [K]: where the system is taken. Every label
    touches the slope and one intercept, so the matrix is an arrowhead (K + 1 square):
    ``corner``, then ``border`` [K] in its first row and column, ``diagonal`` [K] below.

    Returns (corner, border, diagonal, gradient_slope, gradient_intercepts [K]); the
    gradients point uphill.
    """
    k = len(intercepts)
    p = sigmoid(slope * feature + intercepts[level])
    residual = accepted - p
    curvature = p * (1.0 - p)
    return (
        np.sum(curvature * feature**2) + L2,
        np.bincount(level, curvature * feature, k),
        np.bincount(level, curvature, k) + L2,
        np.sum(residual * feature) - L2 * (slope - INITIAL_SLOPE),
        np.bincount(level, residual, k) - L2 * (intercepts - INITIAL_INTERCEPT),
    )


def arrowhead_first(corner, border, diagonal, rhs_first, rhs) -> float:
    """First unknown of an arrowhead system, in O(K): the K others are eliminated."""
    ratio = border / diagonal
    return float((rhs_first - ratio @ rhs) / (corner - ratio @ border))


def arrowhead_rest(border, diagonal, rhs, first: float) -> np.ndarray:
    """The K other unknowns, float64 [K], given the first one."""
    return (rhs - border * first) / diagonal


class ConfidenceEstimator:
    """Predicts acceptance by confidence and depth; calibrates itself on what is verified.

    Deterministic: ranks that see the same calls hold the same parameters.
    """

    def __init__(self, max_depth: int, window: int = 4096):
        """``max_depth``: deepest level a draft can have, the root's children being 1;
        ``window``: newest labels that are kept, so that old traffic is forgotten."""
        if max_depth < 1 or window < 1:
            raise ValueError(
                f"max_depth and window must be at least 1, not {max_depth} and {window}"
            )
        self.max_depth = max_depth
        self.slope = INITIAL_SLOPE
        self.intercepts = np.full(max_depth, INITIAL_INTERCEPT)
        # A ring: label number i is at i % window.
        self._feature = np.zeros(window)
        self._level = np.zeros(window, np.int32)
        self._accepted = np.zeros(window)
        self._seen = 0
        self._calls = 0
        self._fresh = np.zeros(max_depth, bool)  # levels with labels since the last refit

    def predict(self, confidence: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Probability, float32 [N], that each node is accepted if its parent is.

        ``confidence`` float32 [N]: max q at the node's parent; ``depth`` int32 [N]:
        1-based. A node's chance to be reached and accepted is the product over its path.
        """
        feature, level = self._inputs(confidence, depth)
        return sigmoid(self.slope * feature + self.intercepts[level]).astype(np.float32)

    def observe(self, confidence: np.ndarray, depth: np.ndarray, accepted: np.ndarray) -> None:
        """Learn from one step's verified nodes; every 100th call refits.

        ``confidence`` and ``depth`` as in :meth:`predict`, ``accepted`` bool [N]. Pass
        *observed* nodes only: those on the accepted path (true) and the first rejected one,
        whose parent is the path's last node (false). Below it nothing is known, since the
        target never judged those nodes in the text that was kept; counting them as
        rejected would make deep levels look worse than they are. Of siblings pass the one
        tried first: the others are judged only once it is rejected, another event than
        the one modelled here. N may be 0.
        """
        feature, level = self._inputs(confidence, depth)
        accepted = np.asarray(accepted, bool)
        if accepted.shape != level.shape:
            raise ValueError(f"{level.size} nodes, but accepted has shape {accepted.shape}")
        window = len(self._feature)
        kept = slice(max(0, level.size - window), None)
        at = np.arange(self._seen, self._seen + level.size)[kept] % window
        self._feature[at] = feature[kept]
        self._level[at] = level[kept]
        self._accepted[at] = accepted[kept]
        self._seen += level.size
        self._fresh[level] = True
        self._calls += 1
        if self._calls % REFIT_INTERVAL == 0:
            self.refit()

    def refit(self) -> None:
        """One damped Newton (IRLS) step over the labels in the window.

        A parameter makes n / (n + 50) of its step, n being its labels in the window, and
        stays where it is if none of them is new since the last refit: else three lucky
        labels at a rare depth would be believed a little more each time.
        """
        size = min(self._seen, len(self._feature))
        level = self._level[:size]
        corner, border, diagonal, gradient_slope, gradient = normal_equations(
            self._feature[:size], level, self._accepted[:size], self.slope, self.intercepts
        )
        n = np.bincount(level, minlength=self.max_depth)
        share = np.where(self._fresh, n / (n + DAMPING), 0.0)
        share_slope = size / (size + DAMPING) if self._fresh.any() else 0.0
        step = arrowhead_first(corner, border, diagonal, gradient_slope, gradient)
        # A confident draft is never a worse one: below 0 the labels were noise.
        slope = max(0.0, self.slope + share_slope * min(max(step, -MAX_STEP), MAX_STEP))
        # The intercepts make up for the step the slope really makes.
        steps = arrowhead_rest(border, diagonal, gradient, slope - self.slope)
        self.slope = slope
        self.intercepts = self.intercepts + share * np.clip(steps, -MAX_STEP, MAX_STEP)
        self._fresh[:] = False

    def _inputs(self, confidence, depth) -> tuple[np.ndarray, np.ndarray]:
        """(feature float64 [N], level int [N]) of checked inputs."""
        feature, depth = log_odds(confidence), np.asarray(depth, np.int32)
        if depth.ndim != 1 or feature.shape != depth.shape:
            raise ValueError(
                "confidence and depth must be vectors of one length, "
                f"not of shapes {feature.shape} and {depth.shape}"
            )
        if depth.size and not 1 <= depth.min() <= depth.max() <= self.max_depth:
            raise ValueError(
                f"depth must be in 1..{self.max_depth}, not {depth.min()}..{depth.max()}"
            )
        return feature, depth - 1
