"""Penalties at every row, from counts that are kept.

vLLM counts the tokens of every prompt and output anew in each step, which takes as long as the
texts are, and for the rows of a tree once per row. Here the counts of a request stay on the device
from step to step and take in what its text has gained; those of a row are its request's and the few
tokens on the row's path. What is done with them is what vLLM does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from vllm._custom_ops import apply_repetition_penalties
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_specplus.engine.uploads import upload
from vllm_specplus.step import Rows

#: What applying penalties may take at a time beside the counts, and takes per row and entry of the
#: vocabulary: vLLM's kernels less, its function on a CPU as much.
CHUNK_BYTES, ENTRY_BYTES = 2**26, 24


@dataclass(slots=True)
class Texts:
    """The texts of R requests before a step; host arrays."""

    request_ids: list[str]
    token_ids: np.ndarray
    """int32 [R, max_model_len]"""
    num_tokens: np.ndarray
    """int32 [R] known tokens."""
    num_prompt: np.ndarray
    """int32 [R] how many of them are the prompt."""
    versions: np.ndarray
    """int64 [R] as ``StepContext.versions``."""
    penalised: np.ndarray
    """bool [R] requests that ask for a penalty."""


@dataclass(slots=True)
class RowPenalties:
    """A step's penalties, in the place of vLLM's: the last of the logits processors that change
    what is most probable, which is where vLLM's sampler applies its own."""

    request_of: torch.Tensor
    """int64 [L] each row's request."""
    slots: torch.Tensor
    """int64 [L] where the counts of each row's request are."""
    rows: torch.Tensor
    """int64 [N] a row that has, on its path below the root,"""
    tokens: torch.Tensor
    """int64 [N] this token."""
    path_starts: np.ndarray
    """int64 [L + 1] on the host: where those of each row begin."""
    in_prompt: torch.Tensor
    """bool [S, V]"""
    in_output: torch.Tensor
    """int32 [S, V] how often."""
    frequency: torch.Tensor
    """float32 [L]; so are the others."""
    presence: torch.Tensor
    repetition: torch.Tensor

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Changes ``logits`` float32 [L, V] in place, and returns them."""
        size = max(CHUNK_BYTES // (ENTRY_BYTES * logits.shape[1]), 1)
        for first in range(0, len(logits), size):
            self._apply(logits[first : first + size], slice(first, first + size))
        return logits

    def _apply(self, logits: torch.Tensor, part: slice) -> None:
        """To the rows ``part``, which ``logits`` are of."""
        slots = self.slots[part]
        counts = self.in_output[slots]
        begin, end = self.path_starts[part.start], self.path_starts[part.start + len(logits)]
        at = self.rows[begin:end] - part.start, self.tokens[begin:end]
        counts.index_put_(at, counts.new_ones(1), accumulate=True)
        present = counts > 0
        apply_repetition_penalties(logits, self.in_prompt[slots], present, self.repetition[part])
        logits -= self.frequency[part, None] * counts
        logits -= self.presence[part, None] * present


@dataclass(slots=True)
class _Counted:
    """What the counts of a request hold."""

    slot: int
    version: int
    known: int
    """Tokens of its text."""


class TokenCounts:
    """Counts of the tokens of all requests that ask for a penalty, on the device.

    A request that sits out a step loses its counts: they are made again from its text.
    """

    def __init__(self) -> None:
        self._counted: dict[str, _Counted] = {}
        self._clear()

    def _clear(self) -> None:
        self._counted.clear()
        # Slot 0 is that of requests without penalties: nothing was ever counted there.
        self._in_prompt = torch.empty(0, 0, dtype=torch.bool)
        self._in_output = torch.empty(0, 0, dtype=torch.int32)
        self._free: list[int] = []

    def of_rows(
        self, texts: Texts | None, rows: Rows, metadata: SamplingMetadata, logits: torch.Tensor
    ) -> RowPenalties | None:
        """Takes in what ``texts`` have gained; returns the penalties of the step's ``rows``, None
        if nobody asks for any (``texts`` may be None then). ``logits`` [L, V] say where, and for
        how many ids."""
        if metadata.no_penalties or texts is None:
            self._clear()
            return None
        try:
            return self._of_rows(texts, rows, metadata, logits)
        except Exception:  # memory, for example: some tokens may be counted, and some not
            self._clear()
            raise

    def _of_rows(
        self, texts: Texts, rows: Rows, metadata: SamplingMetadata, logits: torch.Tensor
    ) -> RowPenalties:
        device, vocab = logits.device, logits.shape[1]
        emptied = self._assign(texts, device, vocab)
        request_of = np.repeat(np.arange(len(texts.request_ids)), np.diff(rows.starts))
        slots = np.zeros(len(texts.request_ids), np.int64)
        for r in np.flatnonzero(texts.penalised).tolist():
            slots[r] = self._counted[texts.request_ids[r]].slot
        prompt, output = self._gained(texts, vocab)
        path = dict(zip(("rows", "tokens"), path_tokens(rows, vocab), strict=True))
        sent = upload(
            {
                "request_of": request_of,
                "slots": slots[request_of],
                "emptied": emptied,
                "prompt_slots": prompt[0], "prompt": prompt[1],
                "output_slots": output[0], "output": output[1],
            }
            | path,
            device,
        )  # fmt: skip
        if len(emptied):
            self._in_prompt[sent["emptied"]] = False
            self._in_output[sent["emptied"]] = 0
        if len(prompt[0]):
            self._in_prompt[sent["prompt_slots"], sent["prompt"]] = True
        if len(output[0]):
            one = self._in_output.new_ones(1)
            at = sent["output_slots"], sent["output"]
            self._in_output.index_put_(at, one, accumulate=True)
        index = sent["request_of"]
        starts = np.searchsorted(path["rows"], np.arange(len(request_of) + 1))
        return RowPenalties(
            index, sent["slots"], sent["rows"], sent["tokens"], starts,
            self._in_prompt, self._in_output,
            metadata.frequency_penalties[index], metadata.presence_penalties[index],
            metadata.repetition_penalties[index],
        )  # fmt: skip

    def _assign(self, texts: Texts, device: torch.device, vocab: int) -> np.ndarray:
        """Gives every request of ``texts`` with penalties a slot; returns int64 [n] those that have
        to be emptied, since they are another text's."""
        wanted = {
            texts.request_ids[r]: int(texts.versions[r]) for r in np.flatnonzero(texts.penalised)
        }
        for name in [name for name in self._counted if name not in wanted]:
            self._free.append(self._counted.pop(name).slot)
        emptied = []
        for name, version in wanted.items():
            counted = self._counted.get(name)
            if counted is None:
                if not self._free:
                    self._make_room(1 + len(wanted), device, vocab)
                counted = self._counted[name] = _Counted(self._free.pop(), -1, 0)
            if counted.version != version:
                counted.version, counted.known = version, 0
                emptied.append(counted.slot)
        return np.array(emptied, np.int64)

    def _make_room(self, size: int, device: torch.device, vocab: int) -> None:
        """Room for twice as many slots, and ``size`` at least."""
        have = len(self._in_prompt)
        size = max(size, 2 * have)
        self._free.extend(range(size - 1, max(have, 1) - 1, -1))
        for name in ("_in_prompt", "_in_output"):
            old = getattr(self, name)
            new = torch.zeros(size, vocab, dtype=old.dtype, device=device)
            if have:
                new[:have] = old
            setattr(self, name, new)

    def _gained(
        self, texts: Texts, vocab: int
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """(slot, token) int64 [n] each of what was not counted yet, of prompts and of outputs."""
        found: tuple[list, list] = [], []
        for r in np.flatnonzero(texts.penalised).tolist():
            counted = self._counted[texts.request_ids[r]]
            first, end = counted.known, int(texts.num_tokens[r])
            middle = min(max(int(texts.num_prompt[r]), first), end)
            for into, begin, stop in zip(found, (first, middle), (middle, end), strict=True):
                if begin < stop:
                    into.append((counted.slot, texts.token_ids[r, begin:stop]))
            counted.known = end
        return _flat(found[0], vocab), _flat(found[1], vocab)


def _flat(found: list[tuple[int, np.ndarray]], vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """(slot, token) int64 [n]; what is no id of the vocabulary has no logit either."""
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    slots = np.repeat([slot for slot, _ in found], [len(tokens) for _, tokens in found])
    tokens = np.concatenate([tokens for _, tokens in found]).astype(np.int64)
    ids = (tokens >= 0) & (tokens < vocab)
    return slots[ids], tokens[ids]


def path_tokens(rows: Rows, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, token) int64 [N]: the tokens below the root on each row's path, its own included."""
    return _path_tokens(rows.tokens, rows.parents, rows.starts, int(rows.depths.sum()), vocab)


# A signature makes numba compile at import, while the engine starts, not in its first step.
@njit("UniTuple(int64[::1], 2)(int32[::1], int32[::1], int32[::1], int64, int64)", cache=True)
def _path_tokens(tokens, parents, starts, most, vocab):
    found_rows, found = np.empty(most, np.int64), np.empty(most, np.int64)
    count = 0
    for r in range(starts.shape[0] - 1):
        for row in range(starts[r], starts[r + 1]):
            at = row
            while parents[at] >= 0:
                if 0 <= tokens[at] < vocab:
                    found_rows[count], found[count] = row, tokens[at]
                    count += 1
                at = starts[r] + parents[at]
    return found_rows[:count], found[:count]
