"""What the tests of several modules of the data share."""

import pytest

from mimic_files import extracted


@pytest.fixture
def run(tmp_path):
    def write_and_extract(mini, **request):
        return extracted(mini.write(tmp_path / "mimic"), **request)

    return write_and_extract
