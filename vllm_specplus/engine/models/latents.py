"""A causal model of latents in vLLM (``image/continuous/causal.py`` is the plain one).

A request is its label's token; what is generated are placeholder tokens. The latents are in the
model runner's slots (``engine/latents.py``), which writes those that the rows of a step read into
``latents``. Guidance is LlamaGen's here, two branches per request, except that nothing is mixed
before the diffusion head.

What stands for logits are the head's conditions: the head runs where vLLM samples.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.sequence import IntermediateTensors

from vllm_specplus.engine.models.llamagen import Backbone, place
from vllm_specplus.engine.models.loading import load_blocks
from vllm_specplus.image.continuous.causal import CausalLatentsConfig
from vllm_specplus.image.continuous.decoding import GuidedHead
from vllm_specplus.image.continuous.head import MLPHead


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "b"},
        "positions": {0: "b"},
        "latents": {0: "b"},
        "inputs_embeds": {0: "b"},
    }
)
class CausalLatentsModel(Backbone):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config, prefix)
        config: CausalLatentsConfig = self.config
        self.labels = nn.Embedding(config.vocab_size, config.hidden_size)
        self.z_proj = nn.Linear(config.size, config.hidden_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.labels(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        latents: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        labels = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        drawn = self.z_proj(latents.to(self.z_proj.weight.dtype))
        x = torch.where(positions[:, None] == 0, labels, drawn)
        guided = self.config.guidance_scale is not None
        return torch.cat(self.states(x, positions, self.labels.weight[-1] if guided else None), -1)


class CausalLatentsForClassToImage(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: CausalLatentsConfig = vllm_config.model_config.hf_config
        self.config = config
        self.model = CausalLatentsModel(vllm_config=vllm_config, prefix=prefix)
        head = MLPHead(config.size, config.hidden_size, config.head_width, config.head_depth)
        # Whatever the backbone's dtype: CSpD compares densities, which are steep.
        self.diffusion = head.float()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("latents", torch.zeros(rows, config.size).float(), persistent=False)

    @property
    def head(self) -> MLPHead | GuidedHead:
        """Of :meth:`compute_logits`' conditions; with guidance their last column is to be the
        scale."""
        guided = self.config.guidance_scale is not None
        return GuidedHead(self.diffusion) if guided else self.diffusion

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        latents = self.latents[: positions.shape[0]]
        return self.model(input_ids, positions, latents, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Conditions, float32 [n, c]."""
        return hidden_states.float()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        given = dict(weights)
        table = given.pop("cls_embedding.embedding_table.weight")
        # Token 0 stands for any latent, and is never embedded.
        given["labels.weight"] = torch.cat((torch.zeros_like(table[:1]), table))
        head = {name: given.pop(name) for name in list(given) if name.startswith("head.")}
        self.diffusion.load_state_dict(
            {name.removeprefix("head."): tensor.float() for name, tensor in head.items()}
        )
        inner = ((f"model.{name}", tensor) for name, tensor in given.items())
        loaded = load_blocks(self, inner, place)
        return loaded | {name for name, _ in self.named_parameters() if name.startswith("diff")}
