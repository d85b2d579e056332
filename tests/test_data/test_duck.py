"""Large tables in DuckDB: any form read alike, damage named, bounded memory, both files or none."""

import _thread
import gzip
import os
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from medgemma_clinical.data.importers import duck
from medgemma_clinical.data.importers.duck import KEY, NUMBER_OR_EMPTY, TIME, TIME_OR_EMPTY, Column
from medgemma_clinical.files import InputError, RunFault, locked

ROOT = Path(__file__).resolve().parents[2]

# --------------------------------------------------------------------------- database

SPILLING = "CREATE TABLE numbers AS SELECT random() AS x, i FROM range(8_000_000) AS t(i)"


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    with duck.open_database(tmp_path_factory.mktemp("duck") / "out.csv", "200MB", 2) as opened:
        yield opened


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


# --------------------------------------------------------------------------- table files

COLUMNS = {
    "item": KEY,
    "subject": KEY,
    "time": TIME,
    "stored": replace(TIME_OR_EMPTY, optional=True),
    "value": NUMBER_OR_EMPTY,
    "unit": Column("word", may_be_empty=True),
}
HEADER = "item,other,subject,time,value,unit,note\n"
ROW = '{item},7.5,1,2150-01-01 00:{minute:02d}:00,{value},mEq/L,"said ""so"", twice"\n'
TEXT = HEADER + "".join(ROW.format(item=k % 5, minute=k % 60, value=k / 4) for k in range(500))
SECRET = "98765"
BAD_KEYS = (f"3.{SECRET}", f"x{SECRET}", "3" * 20, "")


def read(database, path, keep="true", columns=COLUMNS):
    database.run("DROP TABLE IF EXISTS cells")
    file = duck.open_table(database, path, columns)
    keep = keep.format(item=KEY.typed(file.raw("item")))
    keys = [name for name in ("item", "subject") if name in columns]
    duck.load_table(database, "cells", file, columns, [keep], keys=keys)
    return database.frame("FROM cells ORDER BY ALL")


def test_csv_gzip_and_parquet_are_read_alike(database, tmp_path):
    texts = {
        "plain.csv": TEXT.encode(),
        "within quotes.csv": TEXT.replace("so", "s\no").encode(),
        "blank lines.csv": TEXT.replace("\n", "\n\n", 3).encode(),
        "[o]d *'name.csv": TEXT.encode(),
        "semicolons.csv": TEXT.replace(",", ";").encode(),
        "tabs.csv": TEXT.replace(",", "\t").encode(),
        "packed.csv.gz": gzip.compress(TEXT[:-1].encode()),
    }
    (tmp_path / "od *'name.csv").write_text("a pattern would match this")
    tables = []
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
        tables.append(read(database, tmp_path / name))
    whole = pd.read_csv(tmp_path / "plain.csv")
    whole.assign(time=pd.to_datetime(whole["time"])).to_parquet(tmp_path / "typed.parquet")
    whole.assign(value=whole["value"].astype("float32")).to_parquet(tmp_path / "floats.parquet")
    whole.astype(str).to_parquet(tmp_path / "text.parquet")
    tables += [read(database, path) for path in sorted(tmp_path.glob("*.parquet"))]
    first = tables[0]
    assert len(first) == 500
    assert first["value"].sum() == sum(range(500)) / 4
    assert first["stored"].isna().all()
    for other in tables[1:]:
        pd.testing.assert_frame_equal(other, first)


def test_a_folder_named_like_a_column_replaces_nothing(database, tmp_path):
    """DuckDB's hive partitioning would."""
    folder = tmp_path / "value=1000" / "2=7"
    folder.mkdir(parents=True)
    table = pd.DataFrame({"item": [1, 2], "subject": 2, "time": "2150-01-01", "value": [1.5, 3.0]})
    table.assign(unit="mg").to_parquet(folder / "t.parquet")
    table.assign(unit="mg").to_csv(folder / "t.csv", index=False)
    for path in folder.iterdir():
        assert read(database, path)[["item", "value"]].to_numpy().tolist() == [[1, 1.5], [2, 3]]


def edit(old, new, line=300):
    def change(text):
        lines = text.split("\n")
        assert old in lines[line - 1]
        lines[line - 1] = lines[line - 1].replace(old, new, 1)
        return "\n".join(lines)

    return change


BAD = [  # change, place
    (edit("74.5", SECRET + "x"), ", column value: 1 cell "),
    (edit("2150-01-01 00:58:00", ""), ", column time: 1 cell "),
    *((edit("3,", f"{key},"), ", column item: 1 cell ") for key in BAD_KEYS),
    (lambda text: text.replace(",2150-01-01 00:58", ",soon"), ", column time: 8 cells "),
    (edit("mEq/L,", f'mEq/L,"{SECRET}\n', 501), ", line 501: "),
    (edit('twice"', 'twice"\r'), ", line 300: "),
    (lambda text: "", ": "),
    (lambda text: text.replace(",", "^"), ": no column item among 1: "),
    (edit("value", "valu", 1), ": no column value among 7: "),
]


@pytest.mark.parametrize(("change", "place"), BAD)
def test_damage_is_refused_by_file_and_column_or_line(change, place, database, tmp_path):
    content = change(TEXT).encode()
    for name, written in (("t.csv", content), ("t.csv.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(written)
        with pytest.raises(InputError) as caught:
            read(database, tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}{place}")
        assert SECRET not in str(caught.value)


def test_cells_of_rows_that_are_not_kept_are_not_looked_at_but_for_keys(database, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(edit("74.5", "x")(TEXT))
    assert len(read(database, path, "{item} = 1")) == 100
    path.write_text(edit("3,", "x,")(TEXT))
    with pytest.raises(InputError, match="column item: 1 cell"):
        read(database, path, "{item} = 1")


def test_damage_within_a_parquet_file_is_the_files(database, tmp_path):
    path, refused = tmp_path / "t.parquet", 0
    columns = {"item": range(500), "subject": 1, "time": "2150-01-01", "value": 1.5, "unit": ""}
    pd.DataFrame(columns).to_parquet(path)
    whole = path.read_bytes()
    for k in range(40, len(whole) - 8, 211):
        path.write_bytes(whole[:k] + bytes(20) + whole[k + 20 :])
        try:
            read(database, path)
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
    assert refused > 10


CELLS = {
    "number": ([" 2.5 ", "", "NaN"], [2.5, None, None]),
    "whole": (["1.0", "007", ""], [1, 7, None]),
    "label": (["1.0", "False", ""], [1, 0, None]),
    "word": ([" mg ", "", "x" * 301], ["mg", "", "x" * 300]),
    "id": (["10001.0", "001", "1.5", "a.0"], ["10001", "1", "1.5", "a.0"]),
    "hours": (["0.5", "24"], ["1970-01-01 00:30:00", "1970-01-02 00:00:00"]),
    "time": (["2150-01-01T10:00:00.75"], ["2150-01-01 10:00:00"]),
    "instant": ([" 2150-01-01 9:30:00.25 "], ["2150-01-01 09:30:00.250000"]),
}


@pytest.mark.parametrize("form", CELLS)
def test_cells_of_each_form_are_typed(form, database, tmp_path):
    """An empty cell is missing, a NaN is no number above all others."""
    (texts, expected), path = CELLS[form], tmp_path / "t.parquet"
    pd.DataFrame({"x": texts, "k": range(len(texts))}).to_parquet(path)
    read(database, path, columns={"k": KEY, "x": Column(form, may_be_empty=True)})
    found = database.run("SELECT x FROM cells ORDER BY k").fetchall()
    assert [str(x) if hasattr(x, "year") else x for (x,) in found] == expected


ZONES = ["09:30 PM", "09:30:00 EST", "09:30 America/New_York", "09:30:00+02:00", "09:30:00Z"]


@pytest.mark.parametrize("form", ["time", "instant"])
def test_a_time_with_a_zone_or_words_is_refused(form, database, tmp_path):
    cells = [*(f"2150-01-01 {zone}" for zone in ZONES), "epoch", "infinity"]
    table = pd.DataFrame({"time": ["2150-01-01 9:30", *cells]})
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(InputError, match=rf"{name}, column time: 7 cells "):
            read(database, tmp_path / name, columns={"time": Column(form)})


# --------------------------------------------------------------------------- output

ROWS = pd.DataFrame({"subject_id": [1], "clinical_trajectory": ["20 (0h)"]})
DESCRIPTION = {"made_by": "a test", "rows": {"rows": 1200, "patients": 3, "events": 1}}


def test_a_file_of_another_origin_or_form_is_no_output(tmp_path):
    for name in ("a.csv", "b.json"):
        (tmp_path / name).write_text("{}")
    for name in ("out.txt", "no/such/out.csv", "a.csv", "b.csv"):
        with pytest.raises(InputError, match=f"--out .*{name}: "):
            duck.check_target(tmp_path / name)
    duck.write_rows(ROWS, DESCRIPTION, tmp_path / "c.csv")
    duck.check_target(tmp_path / "c.csv")
    duck.check_target(tmp_path / "new.csv")


def make_file(out, make=lambda _: (ROWS, DESCRIPTION)):
    return duck.make_file(duck.TableRequest(out=out, memory_limit="1GB", threads=1), make)


def test_a_file_has_one_writer_who_removes_what_a_killed_one_spilt(tmp_path):
    with locked(tmp_path / "out.csv"), pytest.raises(InputError, match="another run"):
        make_file(tmp_path / "out.csv")
    for name in (".out.csv.spill-x", ".other.csv.spill-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "values").write_text("patients")
    assert make_file(tmp_path / "out.csv") == 0
    names = {"out.csv", "out.json", ".other.csv.spill-x"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_both_files_are_written_or_none_and_the_description_first(tmp_path, monkeypatch):
    """A table without its description would be read as another series."""
    out, renamed, rename = tmp_path / "out.csv", [], os.replace

    def noted(old, new):
        renamed.append(new.suffix)
        rename(old, new)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", noted)
    duck.write_rows(ROWS, DESCRIPTION, out)
    assert renamed == [".json", ".csv"]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"out.csv", "out.json"}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        duck.write_rows(ROWS.assign(subject_id=2), DESCRIPTION, out)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_each_candidate_is_removed_by_the_first_rule_that_applies():
    rules = pd.DataFrame({"first": [True, True, False], "second": [True, False, False]})
    left, flow = duck.apply_rules(rules, "table", pd.Series(["a", "b", "b"]))
    assert left.tolist() == [False, False, True]
    assert [[*rule.values()] for rule in flow] == [["first", 2, 1, 1], ["second", 0, 1, 1]]
    with pytest.raises(InputError, match="table: of 3 candidates none is left: 3 out"):
        duck.apply_rules(rules.assign(first=True), "table", pd.Series(["a", "b", "b"]))
