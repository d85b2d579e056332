"""DuckDB: bounded memory, no trace on the disk, an end at a signal."""

import _thread
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from medgemma_clinical.data.importers import duck
from medgemma_clinical.files import RunFault

ROOT = Path(__file__).resolve().parents[2]

SPILLING = "CREATE TABLE numbers AS SELECT random() AS x, i FROM range(8_000_000) AS t(i)"


def test_tables_beyond_the_limit_lie_in_a_private_folder_that_goes(tmp_path):
    with duck.open_database(tmp_path / "out.csv", "40MB", 1) as database:
        database.run(SPILLING)
        (spill,) = tmp_path.iterdir()
        assert stat.S_IMODE(spill.stat().st_mode) == 0o700
        assert sum(file.stat().st_size for file in spill.iterdir()) > 2**22
        assert database.row("SELECT count(*) FROM numbers") == (8_000_000,)
    assert not list(tmp_path.iterdir())


def test_threads_are_at_most_the_cores_and_a_lack_of_memory_is_a_fault_of_the_run(tmp_path):
    cores = len(os.sched_getaffinity(0))
    for given, used in ((0, cores), (1, 1), (100_000, cores)):
        with duck.open_database(tmp_path / "out.csv", "20MB", given) as database:
            assert database.row("SELECT current_setting('threads')") == (used,)
            with pytest.raises(RunFault, match="--memory_limit"):
                database.run("SELECT list(i) FROM range(8_000_000) AS t(i)")


FULL = """
import resource, sys
from pathlib import Path
from medgemma_clinical.data.importers.duck import open_database
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
with open_database(Path(sys.argv[1]) / "out.csv", "40MB", 1) as database:
    database.run(sys.argv[2])
"""


@pytest.mark.slow
def test_a_full_disk_is_not_taken_for_a_damaged_table(tmp_path):
    """A limit of the size of files stands for it."""
    command = [sys.executable, "-c", FULL, str(tmp_path), SPILLING]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "RunFault: " in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(120, method="thread")  # a signal would wait for the query's hours
@pytest.mark.parametrize("when", ["while it is waited for", "before it is waited for"])
def test_an_interrupt_ends_a_query(when, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        time.sleep(0.3)  # the query has begun
        raise KeyboardInterrupt

    slow = "SELECT sum(a.i * b.i) FROM range(10_000_000) AS a(i), range(1_000_000) AS b(i)"
    opened = duck.open_database(tmp_path / "out.csv", "50MB", 2)
    with pytest.raises(KeyboardInterrupt), opened as database:  # noqa: PT012
        if when.startswith("before"):
            monkeypatch.setattr(duck, "tqdm", interrupted)
        else:
            threading.Timer(0.5, _thread.interrupt_main).start()
        database.run(slow)
    assert not list(tmp_path.iterdir())
