"""A text model with rotary positions of three axes that differ, as pictures make them.

The vision models that have them need libraries that a CPU build of vLLM comes without (see
``test_pictures.py``).
"""

import torch
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM


class MRopeText(Qwen2ForCausalLM, SupportsMRoPE):
    def get_mrope_input_positions(self, input_tokens, mm_features):
        """Positions [3, n] of a prompt, and by how much text behind it is ahead of its index."""
        index = torch.arange(len(input_tokens))
        positions = torch.stack([index, index // 2, index // 3 + 1])
        return positions, int(positions.max()) + 1 - len(input_tokens)
