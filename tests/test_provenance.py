"""The peak of memory belongs to the run that began last."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from medgemma_clinical.provenance import peak_memory, peak_mib, reset_peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a process's peak")
def test_a_new_measurement_forgets_the_peak_before() -> None:
    reset_peak_memory()
    low = peak_mib()
    assert low is not None
    block: list[Any] = [np.ones(200 * 2**17)]  # 200 MiB
    block.append(block)  # as models that know each other: freed by the collector alone
    high = peak_mib()
    assert high is not None
    assert high > low + 150
    del block
    reset_peak_memory()
    after = peak_mib()
    assert after is not None
    assert after < high - 150
    assert peak_memory().startswith(f"peak memory {after:,.0f} MiB")
