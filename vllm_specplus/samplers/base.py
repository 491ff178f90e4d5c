"""What an acceptance rule decides: which nodes of the drafts become text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(slots=True)
class Rows:
    """The verified rows of a step on the host, request by request.

    ``L`` rows, ``R`` requests. A request without drafts has one row, its root.
    """

    tokens: np.ndarray
    """int32 [L] input token of each row."""
    parents: np.ndarray
    """int32 [L] parent row within the request; -1 for roots."""
    starts: np.ndarray
    """int32 [R + 1] first row of each request."""
    depths: np.ndarray
    """int32 [L] distance from the root."""


@dataclass(slots=True)
class Acceptance:
    """Outcome of a step."""

    path: np.ndarray
    """int32 [R, width] accepted rows of each request, the root's 0 first, -1 padded."""
    lengths: np.ndarray
    """int32 [R] rows on the path; also the number of output tokens."""
    output: np.ndarray
    """int32 [R, width] output tokens, -1 padded."""
