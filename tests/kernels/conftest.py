"""Repairs Triton's interpreter, in which the kernels run when there is no GPU."""

import numpy as np
import pytest
import torch
import triton.language as tl


@pytest.fixture(autouse=True)
def interpret_bfloat16_products(monkeypatch):
    """Triton's interpreter (3.9) keeps bfloat16 as uint16 and multiplies it as such in ``tl.dot``.

    Give ``tl.dot`` the same values as float32.
    """
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def to_float32(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, to_float32(a), to_float32(b), *rest),
    )
