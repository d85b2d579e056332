"""Shared by the tests of figures and pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from medgemma_clinical.evaluation import bootstrap


@pytest.fixture(scope="module")
def few_draws() -> Iterator[None]:
    """Draw 200 bootstrap samples in place of 1,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "REPLICATES", 200)
        yield
