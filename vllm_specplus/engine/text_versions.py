"""Which texts have only grown, so that nobody has to compare them. NumPy only, no vLLM.

What is kept about a text from step to step (a draft's keys and values, counts of its tokens, where
they occurred) holds as long as tokens are only appended. vLLM also cuts texts: a streaming session
goes on behind what was computed, and where keys and values could not be loaded, output is computed
anew. Neither is announced, but a text that is looked at before and after each of its steps cannot
be cut unseen: it is shorter then than it was, or has another prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class TextVersions:
    """Numbers the texts of requests: while a request's number stays, its text has only grown."""

    def __init__(self) -> None:
        # Request -> version, length and prompt when it was looked at last.
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._next = 0

    def look(
        self, request_ids: Sequence[str], num_tokens: np.ndarray, num_prompt: np.ndarray
    ) -> np.ndarray:
        """int64 [R] versions of the texts, by now of ``num_tokens`` int32 [R], ``num_prompt`` int32
        [R] of which are the prompt. To be called before and after a step makes texts longer."""
        versions = np.empty(len(request_ids), np.int64)
        lengths, prompts = num_tokens.tolist(), num_prompt.tolist()
        for r, name in enumerate(request_ids):
            version, length, prompt = self._seen.get(name, (-1, 0, 0))
            if version < 0 or lengths[r] < length or prompts[r] != prompt:
                version, self._next = self._next, self._next + 1
            self._seen[name] = version, lengths[r], prompts[r]
            versions[r] = version
        return versions

    def forget(self, request_id: str) -> None:
        """The request is gone; another one may get its name."""
        self._seen.pop(request_id, None)
