"""Weights of models that transformers does not know: drawn in the engine, by the load format
"drawn"."""

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader


@register_model_loader("drawn")
class DrawnWeights(DummyModelLoader):
    """Spread so that greedy text has many distinct tokens; norms are near what they were made."""

    def load_weights(self, model, model_config):
        draws = torch.Generator().manual_seed(7)
        for name, weight in sorted(model.named_parameters()):
            drawn = torch.empty_like(weight).normal_(0, 0.1, generator=draws)
            weight.data = weight.data + drawn if "norm" in name else drawn
