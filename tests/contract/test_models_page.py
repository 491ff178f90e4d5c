"""docs/models.md says what the contract says."""

from __future__ import annotations

import pytest

from scripts import models_page


@pytest.mark.slow
def test_the_page_is_written_from_the_contract():
    assert models_page.page() == models_page.PAGE.read_text(encoding="utf-8"), (
        "run python scripts/models_page.py"
    )
