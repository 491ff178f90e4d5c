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
    """Order for several workers (pytest-xdist): a file's tests share its fixtures and stay
    together, and the engine's tests, which last longest, come first."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
