"""Shared by the tests of metrics and pages."""

import pytest

from medgemma_clinical.evaluation import metrics


@pytest.fixture(scope="module")
def few_draws():
    """Draw 200 bootstrap samples in place of 1,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "REPLICATES", 200)
        yield
