"""Settings that have to be made before any test module is imported."""

import os

import pytest
import torch

# Without a GPU the Triton kernels are interpreted. Triton reads this when it is first imported,
# which vLLM does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The engine's tests, which last longest, come first: several workers (pytest-xdist) then
    end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)
