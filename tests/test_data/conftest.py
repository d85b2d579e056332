"""What the tests of several modules of the data share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mimic_files import Extracted, Mini, Run, extracted


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def write_and_extract(mini: Mini, **request: Any) -> Extracted:
        return extracted(mini.write(tmp_path / "mimic"), **request)

    return write_and_extract
