"""Settings that have to be made before any test module is imported; which tests are run."""

import os

import pytest
import torch

from tests.stamps import FILES, LONG, Stamping, covered

# No test asks the Hugging Face hub: a name that is no folder is one of its models.
os.environ["HF_HUB_OFFLINE"] = "1"

# Without a GPU the Triton kernels are interpreted. Triton reads this when it is first imported,
# which vLLM does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="run the long tests, and no others; stamp them"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Of several processes (pytest-xdist) the first one hears of all results.
    if config.getoption("--full") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Stamping())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The engine's tests, which last longest, come first: several workers (pytest-xdist) then
    end at about the same time. Long tests are left out, or the others."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)
    digests = {item: covered(item) for item in items}
    config.stash[LONG] = {item.nodeid: files for item, files in digests.items() if files}
    config.stash[FILES] = {item.nodeid.split("::")[0] for item in items}
    full = config.getoption("--full")
    chosen = [item for item in items if (digests[item] is not None) == full]
    if full:
        for item in chosen:
            item.user_properties.append(("covers", digests[item]))
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
