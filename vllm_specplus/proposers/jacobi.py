"""Speculative Jacobi decoding: last step's own rows are the next draft (arXiv 2410.01699).

No draft model and no weights. A window of W tokens is verified in every step: the newest token
and W - 1 drafted ones. Each verified row also gives the distribution of the token after it.
Behind the first rejection those distributions were computed on a prefix that is wrong by a
token, but close: a token is drawn from each, and becomes the draft for its position, with
that distribution as its ``q``. Fresh places at the window's end are drawn from the
distribution of its last row. Greedy requests take the most probable tokens instead (plain
Jacobi decoding, arXiv 2305.10427).

Verification is the standard one and therefore lossless; with ``acceptance`` ``gsd`` this is
Grouped Speculative Decoding (arXiv 2508.07747). It pays where neighbouring positions hardly
constrain each other, as in pictures; text accepts little.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from vllm_specplus.config import MethodConfig
from vllm_specplus.drafting.noise import DraftNoise
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.registry import register_method
from vllm_specplus.samplers.probabilities import draw
from vllm_specplus.step import Source, StepContext
from vllm_specplus.tree import DraftBatch

#: Sets its noise apart from that of other methods for the same seed.
JACOBI = 2305_10427


class JacobiConfig(MethodConfig):
    """``{"method": "jacobi", ...}``."""

    fuses: ClassVar[bool] = False
    drafts_pictures: ClassVar[bool] = True

    method: Literal["jacobi"] = "jacobi"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 15
    """The window less the token that is being read."""

    @property
    def rule(self) -> str | None:
        return "without_replacement"


@register_method
class Jacobi(Proposer):
    config_class = JacobiConfig
    sources = (Source("window", "draft", 0.5),)
    reads_target_probs = True
    top_k = 1

    def __init__(self, config: JacobiConfig, services: Services):
        super().__init__(config, services)
        # A place of the window is a level: how many pay is decided before they are drawn.
        self.levels = (1,) * config.num_speculative_tokens

    def load_draft(self, device: torch.device, dtype: torch.dtype) -> None:
        self._noise = DraftNoise(device)

    def propose(self, step: StepContext) -> DraftBatch:
        counts = step.max_nodes.astype(np.int32)
        starts = step.row_starts
        if not counts.any():
            return DraftBatch.empty(len(counts))
        accepted = np.add.reduceat(step.observation.accepted.astype(np.int32), starts[:-1])
        # Node i of a request goes by the row i + 1 behind the last accepted one, and by the
        # request's last row where there is none.
        request = np.repeat(np.arange(len(counts)), counts)
        node = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
        row = np.minimum(starts[request] + accepted[request] + node, starts[request + 1] - 1)
        parents = (node - 1).astype(np.int32)
        if step.target_probs is None:  # all are greedy
            tokens = step.observation.top_ids[row, 0]
            return DraftBatch(tokens, parents, counts, np.zeros(len(tokens), np.int32))
        device = step.target_probs.device
        probs = step.target_probs[torch.from_numpy(row).to(device)]
        places = [(length, JACOBI) for length in step.num_tokens.tolist()]
        noise = self._noise.uniform(int(counts.max()), step.sampling.seeds, places)
        index = torch.from_numpy(np.stack((request, node))).to(device)
        tokens = draw(probs, noise[index[0], index[1]]).cpu().numpy()
        drawn_from = np.arange(len(tokens), dtype=np.int32)
        greedy = step.sampling.temperature[request] == 0
        tokens[greedy] = step.observation.top_ids[row[greedy], 0]
        drawn_from[greedy] = -1
        return DraftBatch(
            tokens.astype(np.int32), parents, counts, np.zeros(len(tokens), np.int32),
            draft_probs=probs, drawn_from=drawn_from,
        )  # fmt: skip
