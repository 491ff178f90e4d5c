"""A draft of four tokens whose law is a table, and a draft's process without a process.

The law of a token depends on the two before it. What the process says is kept in a list.
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch

from vllm_specplus.drafting.noise import DraftNoise
from vllm_specplus.drafting.overlap_config import OverlapConfig
from vllm_specplus.overlap.loop import ANSWER, DraftLoop
from vllm_specplus.overlap.messages import Message
from vllm_specplus.overlap.rounds import GoesOn, overlapped
from vllm_specplus.overlap.steps import Asked, StepTeller
from vllm_specplus.proposer import Services
from vllm_specplus.proposers.draft_tree import DraftTree
from vllm_specplus.step import DEPTHS, StepContext

V = 4
CPU = torch.device("cpu")


def law(seed: int) -> np.ndarray:
    """float32 [V, V, V]: probabilities of a token behind two others."""
    weights = np.random.default_rng(seed).gamma(0.7, size=(V, V, V)) + 0.05
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


class ToyExecutor:
    """The table as an executor of drafts."""

    graphs = None

    def __init__(self, table: np.ndarray, max_nodes: int):
        self.table, self.max_nodes = table, max_nodes
        self.model = SimpleNamespace(max_positions=1 << 20, device=CPU)
        self.trees = SimpleNamespace(nodes=0)
        self.passes = 0

    def room(self, request: str, length: int) -> bool:
        return True

    def forget(self, request: str) -> None:
        pass

    def begin(self, names: list[str], texts: list[np.ndarray], versions: Any = None):
        self.passes += 1
        self.trees.nodes = 0
        self._ends = np.array([text[-2:] for text in texts])
        self._nodes = np.zeros((len(texts), self.max_nodes, 2), np.int64)
        return torch.from_numpy(np.log(self.table[self._ends[:, 0], self._ends[:, 1]]))

    def grow(self, active, tokens, parents, generations=1):
        self.passes += 1
        width = tokens.shape[1]
        first = self.trees.nodes
        self.trees.nodes += width
        assert self.trees.nodes <= self.max_nodes
        active, tokens, parents = (each.numpy() for each in (active, tokens, parents))
        for j in range(width):
            above = parents[:, j]
            assert (above < first + (j if generations > 1 else 0)).all()
            before = np.where(
                above[:, None] < 0, self._ends[active], self._nodes[active, above.clip(0)]
            )
            self._nodes[active, first + j] = np.stack((before[:, 1], tokens[:, j]), -1)
        own = self._nodes[active, first : first + width]
        return torch.from_numpy(np.log(self.table[own[..., 0], own[..., 1]]))


class ToyConfig(OverlapConfig):
    method: Literal["toy"] = "toy"


class ToyTree(DraftTree):
    config_class = ToyConfig
    table: np.ndarray

    def load_draft(self, device, dtype):
        self._executor = ToyExecutor(self.table, self.most_nodes)
        self._noise = DraftNoise(device)


class KeptChannel:
    """A channel whose other end is the test."""

    closed = False

    def __init__(self) -> None:
        self.said: list[Message] = []
        self.to_hear: deque[Message] = deque()

    def send(self, kind: str, arrays: dict | None = None, **fields: Any) -> None:
        raw = Message(kind, fields, arrays or {}).pack()
        self.said.append(Message.unpack(raw))

    def receive(self, seconds: float | None) -> Message | None:
        return self.to_hear.popleft() if self.to_hear else None


class Alone:
    """A draft's process that does one thing at a time."""

    def __init__(self, drafter: GoesOn):
        self.channel = KeptChannel()
        self.loop = DraftLoop(self.channel, CPU)  # type: ignore[arg-type]
        self.loop.drafter = self.drafter = drafter
        self.teller = StepTeller(8)
        self.number = 0

    def tell(self, step: StepContext, wanted: bool = True, price: float = -1.0) -> None:
        """Say a step, which the process hears when it looks next."""
        self.number += 1
        requests = len(step.request_ids)
        followed = np.full((requests, DEPTHS), 0.7, np.float32)
        asked = Asked(self.number, wanted, price, np.ones(requests), followed)
        self.channel.to_hear.append(Message.unpack(self.teller.message(step, asked).pack()))

    def work(self) -> None:
        """Until nothing is left to do."""
        while self.channel.to_hear or self.loop._said:
            while self.loop._hear(0):
                pass
            with torch.inference_mode():
                self.loop._serve()

    def ask(self, step: StepContext, **keys: Any) -> Message:
        """What is answered to a step; the process has gone on when this returns."""
        self.tell(step, **keys)
        self.work()
        (answer,) = (
            each for each in self.channel.said
            if each.kind == ANSWER and each.fields["number"] == self.number
        )  # fmt: skip
        return answer

    @property
    def faults(self) -> list[str]:
        return [each.fields["text"] for each in self.channel.said if each.kind == "fault"]


def toy(table: np.ndarray, **keys: Any) -> Alone:
    """A process with the draft of a ``table``."""
    config = ToyConfig(**({"overlap": True} | keys))
    drafter = overlapped(ToyTree)(config, Services(V))
    drafter.table = table
    drafter.load_draft(CPU, torch.float32)
    return Alone(drafter)
