"""What a user of the training core is told."""

from __future__ import annotations


class TrainingError(ValueError):
    """The training cannot be done; the message is one sentence that says why, what is allowed and
    what to write instead."""
