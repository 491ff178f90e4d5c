"""Settings that have to be made before any test module is imported."""

import os

import torch

# Without a GPU the Triton kernels are interpreted. Triton reads this when it is first imported,
# which vLLM does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
