"""Speculative Jacobi decoding: last step's own rows are the next draft (arXiv 2410.01699).

No draft model and no weights. A window of W tokens is verified in every step: the newest token
and W - 1 drafted ones. Each verified row also gives the distribution of the token after it.
Behind the first rejection those distributions were computed on a prefix that is wrong by a
token, but close: a token is drawn from each, and becomes the draft for its position, with
that distribution as its ``q``. Fresh places at the window's end are drawn from the
distribution of its last row, or hold any code of the picture's, as in the authors' code
(``initial``). Greedy requests take the most probable tokens instead (plain Jacobi decoding,
arXiv 2305.10427).

Verification is the standard one and therefore lossless; with ``acceptance`` ``gsd`` this is
Grouped Speculative Decoding (arXiv 2508.07747). It pays where neighbouring positions hardly
constrain each other, as in pictures; text accepts little.

``preset`` stands for what the released codes run a model with: ``tyshiwo1/Accelerating-T2I-AR-
with-SJD`` Anole, ``junhyukso/GSD`` Lumina-mGPT. A user's own keys come before it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from vllm_specplus.config import MethodConfig
from vllm_specplus.drafting.noise import DraftNoise
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.registry import register_method
from vllm_specplus.samplers.probabilities import draw
from vllm_specplus.step import Source, StepContext
from vllm_specplus.tree import DraftBatch

#: Sets its noise apart from that of other methods for the same seed.
JACOBI = 2305_10427
#: Its second source.
ANY_CODE = 1
_SJD = {"num_speculative_tokens": 15, "initial": "random"}
PRESETS: dict[str, dict[str, Any]] = {
    "anole": _SJD,
    "lumina_mgpt": _SJD
    | {"acceptance": {"rule": "gsd", "group": 14, "max_gap": 0.15, "max_distance": 0.5}},
}


class JacobiConfig(MethodConfig):
    """``{"method": "jacobi", ...}``."""

    fuses: ClassVar[bool] = False
    drafts_pictures: ClassVar[bool] = True

    method: Literal["jacobi"] = "jacobi"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 15
    """The window less the token that is being read."""
    initial: Literal["row", "random"] = "row"
    """What a place holds that no row tells of: a draw of the last row, or any code (of sampling
    requests, in pictures)."""
    preset: Literal["anole", "lumina_mgpt"] | None = None
    """Take the keys that are not given from a released code's settings for this model."""

    @model_validator(mode="before")
    @classmethod
    def _preset_goes_behind(cls, keys: Any) -> Any:
        if isinstance(keys, dict) and keys.get("preset") in tuple(PRESETS):
            return PRESETS[keys["preset"]] | keys
        return keys

    @property
    def rule(self) -> str | None:
        return "without_replacement"


@register_method
class Jacobi(Proposer):
    config_class = JacobiConfig
    sources = (Source("window", "draft", 0.5), Source("any code", "draft", 0.02))
    _codes: torch.Tensor | None = None
    """int64 [n], what ``initial`` "random" draws from."""
    reads_target_probs = True
    top_k = 1

    def __init__(self, config: JacobiConfig, services: Services):
        super().__init__(config, services)
        # A place of the window is a level: how many pay is decided before they are drawn.
        self.levels = (1,) * config.num_speculative_tokens

    def load_draft(self, device: torch.device, dtype: torch.dtype) -> None:
        self._noise = DraftNoise(device)
        if self.config.initial == "random":
            self._codes = self.services.codebook().any(-1).nonzero()[:, 0].to(device)

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
        row, last = starts[request] + accepted[request] + node, starts[request + 1] - 1
        fresh, row = row > last, np.minimum(row, last)
        parents = (node - 1).astype(np.int32)
        if step.target_probs is None:  # all are greedy
            tokens = step.observation.top_ids[row, 0]
            return DraftBatch(tokens, parents, counts, np.zeros(len(tokens), np.int32))
        device = step.target_probs.device
        probs = step.target_probs[torch.from_numpy(row).to(device)]
        places = [(length, JACOBI) for length in step.num_tokens.tolist()]
        noise = self._noise.uniform(int(counts.max()), step.sampling.seeds, places)
        index = torch.from_numpy(np.stack((request, node))).to(device)
        noise = noise[index[0], index[1]]
        tokens = draw(probs, noise).cpu().numpy()
        drawn_from = np.arange(len(tokens), dtype=np.int32)
        sources = np.zeros_like(drawn_from)
        greedy = step.sampling.temperature[request] == 0
        tokens[greedy] = step.observation.top_ids[row[greedy], 0]
        drawn_from[greedy] = -1
        if self._codes is not None:
            anywhere = np.flatnonzero(fresh & ~greedy)
            codes, may = self._any_code(probs, noise, anywhere)
            anywhere = anywhere[may]
            tokens[anywhere], drawn_from[anywhere], sources[anywhere] = codes[may], -1, ANY_CODE
        return DraftBatch(
            tokens.astype(np.int32), parents, counts, sources,
            draft_probs=probs, drawn_from=drawn_from,
        )  # fmt: skip

    def _any_code(
        self, probs: torch.Tensor, noise: torch.Tensor, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Any code int64 [m] for each of ``places`` int64 [m], by ``noise`` [n], and where
        ``probs`` [n, V] says that a code may stand, bool [m]. It is deterministic to
        verification: it was chosen without regard to the text."""
        codes, at = self._codes, torch.from_numpy(places).to(probs.device)
        assert codes is not None
        may = (probs[at].index_select(1, codes) > 0).any(-1)
        chosen = codes[(noise[at] * len(codes)).long()]
        return chosen.cpu().numpy(), may.cpu().numpy()
