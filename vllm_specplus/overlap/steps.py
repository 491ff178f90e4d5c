"""A step as the draft's process is told of it: what is new of the texts, and what is asked.

Texts grow on both sides; only what is new of a text travels, unless it has become another one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_specplus.overlap.messages import Message, from_bytes, to_bytes
from vllm_specplus.step import Observation, Sampling, StepContext, TargetRows

#: A message that says so: a step, and the one whose drafts were not waited for.
STEP, UNDRAFTED = "step", "undrafted"
_NONE = np.empty(0, np.int32)


@dataclass(slots=True)
class Asked:
    """What the engine wants to have drafted for a step."""

    number: int
    """Of the step, ascending."""
    wanted: bool
    """Does it wait for drafts? Else none are verified in this step."""
    price: float
    """Seconds: trees that are not there yet are worth waiting for if all of them together are worth
    more."""
    worth: np.ndarray
    """float32 [R] seconds that each request's tree is worth."""
    followed: np.ndarray
    """float32 [R, depths] probability that the text follows a tree to a level, if it did to the
    one above; the last one serves all deeper levels."""


class StepTeller:
    """The engine's side: knows what the other side knows of the texts."""

    def __init__(self, page: int = 0):
        """``page``: slots of a page of the target's, if the draft's are numbered like them."""
        self._page = page
        self._told: dict[str, tuple[int, int]] = {}  # request -> version, tokens

    def forget(self, request: str) -> None:
        self._told.pop(request, None)

    def message(self, step: StepContext, asked: Asked) -> Message:
        """The step as a message, whose arrays are copies."""
        lengths = step.num_tokens.astype(np.int32)
        known = [
            self._tell(name, step.versions, r, int(lengths[r]))
            for r, name in enumerate(step.request_ids)
        ]
        parts = [step.token_ids[r, first : lengths[r]] for r, first in enumerate(known)]
        arrays = {
            "known": np.array(known, np.int32), "lengths": lengths,
            "tokens": np.concatenate(parts) if parts else _NONE,
            "max_nodes": step.max_nodes.astype(np.int32), "chain_only": step.chain_only.copy(),
            "worth": asked.worth.astype(np.float32), "followed": asked.followed.astype(np.float32),
        }  # fmt: skip
        fields = {
            "number": asked.number, "wanted": asked.wanted, "price": asked.price,
            "requests": list(step.request_ids), "seeds": None,
        }  # fmt: skip
        if step.versions is not None:
            arrays["versions"] = step.versions.astype(np.int64)
        if step.sampling is not None:
            sampling = step.sampling
            fields["seeds"] = list(sampling.seeds)
            arrays |= {
                "temperature": sampling.temperature.astype(np.float32),
                "top_k": sampling.top_k.astype(np.int32),
                "top_p": sampling.top_p.astype(np.float32),
            }
        if step.target_rows is not None:
            rows = step.target_rows
            pages = -(-int(lengths.max(initial=1)) // self._page)
            fields["states"] = str(rows.states.dtype).removeprefix("torch.")
            arrays |= {
                "states": to_bytes(rows.states), "positions": rows.positions.copy(),
                "starts": rows.starts.copy(), "pages": rows.pages[: len(known), :pages].copy(),
            }  # fmt: skip
        return Message(STEP, fields, arrays)

    def _tell(self, request: str, versions: np.ndarray | None, r: int, length: int) -> int:
        """How many tokens of this text the other side knows."""
        if versions is None:
            return 0
        version, told = self._told.get(request, (None, 0))
        self._told[request] = int(versions[r]), length
        return min(told, length) if version == versions[r] else 0


class StepReader:
    """The draft's side: holds the texts."""

    def __init__(self, device: torch.device):
        self._device = device
        self._texts: dict[str, np.ndarray] = {}  # longer than the text

    def forget(self, request: str) -> None:
        self._texts.pop(request, None)

    def read(self, message: Message) -> tuple[StepContext, Asked]:
        """The step that a message of :class:`StepTeller` tells, and what is asked."""
        fields, arrays = message.fields, message.arrays
        lengths, names = arrays["lengths"], fields["requests"]
        self._grow(names, arrays["known"].tolist(), lengths.tolist(), arrays["tokens"])
        texts = np.zeros((len(names), int(lengths.max(initial=0))), np.int32)
        for row, name, length in zip(texts, names, lengths.tolist(), strict=True):
            row[:length] = self._texts[name][:length]
        sampling = None
        if fields["seeds"] is not None:
            sampling = Sampling(
                arrays["temperature"], arrays["top_k"], arrays["top_p"], fields["seeds"]
            )
        step = StepContext(
            request_ids=names, token_ids=texts, num_tokens=lengths,
            max_nodes=arrays["max_nodes"].copy(), chain_only=arrays["chain_only"],
            observation=Observation(_NONE, _NONE, _NONE.reshape(0, 0), _NONE > 0),
            sampling=sampling, versions=arrays.get("versions"),
        )  # fmt: skip
        if "states" in arrays:
            dtype = getattr(torch, fields["states"])
            step.target_rows = TargetRows(
                from_bytes(arrays["states"], dtype, self._device), arrays["positions"],
                arrays["starts"], arrays["pages"],
            )  # fmt: skip
        asked = Asked(
            fields["number"], fields["wanted"], fields["price"], arrays["worth"],
            arrays["followed"],
        )  # fmt: skip
        return step, asked

    def _grow(
        self, names: list[str], known: list[int], lengths: list[int], tokens: np.ndarray
    ) -> None:
        begin = 0
        for name, first, length in zip(names, known, lengths, strict=True):
            text = self._texts.get(name, _NONE)
            if len(text) < length:
                longer = np.zeros(max(length, 2 * len(text)), np.int32)
                longer[:first] = text[:first]
                text = self._texts[name] = longer
            text[first:length] = tokens[begin : begin + length - first]
            begin += length - first
