"""The CUDA back ends run their kernels in Triton's interpreter here."""

from tests.kernels.conftest import interpret_bfloat16_products  # noqa: F401
