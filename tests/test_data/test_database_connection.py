"""A database in bounded memory: what spills is private and removed; signals end a query."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from medgemma_clinical.data.database.connection import open_database
from medgemma_clinical.files import RunFault

ROOT = Path(__file__).resolve().parents[2]
SPILLING = "CREATE TABLE numbers AS SELECT random() AS x, i FROM range(20_000_000) AS t(i)"


def test_tables_beyond_the_limit_lie_in_a_private_folder_that_goes(tmp_path: Path) -> None:
    with open_database(tmp_path, "100MB", 1) as database:
        database.run(SPILLING)
        (spill,) = tmp_path.iterdir()
        assert stat.S_IMODE(spill.stat().st_mode) == 0o700
        assert sum(file.stat().st_size for file in spill.iterdir()) > 2**24
        assert database.row("SELECT count(*) FROM numbers") == (20_000_000,)
    assert not list(tmp_path.iterdir())


def test_a_query_that_needs_more_memory_ends_with_one_line(tmp_path: Path) -> None:
    with (
        open_database(tmp_path, "20MB", 2) as database,
        pytest.raises(RunFault, match="more memory than --memory_limit, or more room"),
    ):
        database.run("SELECT list(i) FROM range(20_000_000) AS t(i)")


FULL = """
import resource, sys
from pathlib import Path
from medgemma_clinical.data.database.connection import open_database
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
with open_database(Path(sys.argv[1]), "60MB", 1) as database:
    database.run(sys.argv[2])
"""


def test_a_full_disk_is_not_taken_for_a_damaged_table(tmp_path: Path) -> None:
    """A limit of the size of files stands for it."""
    command = [sys.executable, "-c", FULL, str(tmp_path), SPILLING]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "RunFault: the tables need more memory than --memory_limit, or more room" in done.stderr
    assert not list(tmp_path.iterdir())


def test_values_and_tables_reach_sql(tmp_path: Path) -> None:
    with open_database(tmp_path, "100MB", 1) as database:
        database.set(limit_of=2)
        database.add("few", pd.DataFrame({"x": [1, 2, 3]}))
        found = database.frame("SELECT x FROM few WHERE x >= getvariable('limit_of') ORDER BY x")
        assert found["x"].tolist() == [2, 3]
        assert database.row("SELECT count(*) FROM few WHERE x < $most", {"most": 3}) == (2,)


def test_nothing_is_loaded_from_the_network(tmp_path: Path) -> None:
    with open_database(tmp_path, "100MB", 1) as database:
        for name in ("autoinstall_known_extensions", "autoload_known_extensions"):
            assert database.row(f"SELECT current_setting('{name}')") == (False,)


QUERY = """
import sys
from pathlib import Path
import dataset_format
from medgemma_clinical.commands.command_line import (run_command)
from medgemma_clinical.commands.logs import (start_logging)
from medgemma_clinical.data.database.connection import open_database
def query():
    with open_database(Path(sys.argv[1]), "50MB", 2) as database:
        print("begun", flush=True)
        database.run("SELECT sum(a.i * b.i) FROM range(10_000_000) AS a(i), range(1000000) AS b(i)")
start_logging()
dataset_format.end_on_signals()
sys.exit(run_command(query))
"""


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "error: interrupted: nothing more was written\n"),
        (signal.SIGTERM, 143, ""),
    ],
)
def test_a_signal_ends_a_query_at_once(
    number: signal.Signals, code: int, line: str, tmp_path: Path
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", QUERY, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        time.sleep(0.5)
        begun = time.monotonic()
        child.send_signal(number)
        _, errors = child.communicate(timeout=60)
        assert time.monotonic() - begun < 10
    finally:
        child.kill()
    assert (child.returncode, errors) == (code, line)
    assert not list(tmp_path.iterdir())


def test_a_terminal_shows_how_far_a_query_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_database(tmp_path, "100MB", 1) as database:
        database.run("SELECT 1", title="reading it")
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        database.run("SELECT 1", title="reading it")
        assert "reading it: " in capsys.readouterr().err
        database.run("SELECT 1")
        assert capsys.readouterr().err == ""
