"""Tables of any form are read alike; damage is named by file and column or line."""

import gzip
from dataclasses import replace

import pandas as pd
import pytest

from medgemma_clinical.data.importers import cells, duck, tables
from medgemma_clinical.data.importers.questions import OpenQuestions
from medgemma_clinical.files import InputError


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    with duck.open_database(tmp_path_factory.mktemp("duck") / "out.csv", "200MB", 2) as opened:
        yield opened


COLUMNS = {
    "item": cells.KEY,
    "subject": cells.KEY,
    "time": cells.TIME,
    "stored": cells.Time(may_be_empty=True, optional=True),
    "value": cells.NUMBER_OR_EMPTY,
    "unit": cells.WORD_OR_EMPTY,
}
HEADER = "item,other,subject,time,value,unit,note\n"
ROW = '{item},7.5,1,2150-01-01 00:{minute:02d}:00,{value},mEq/L,"said ""so"", twice"\n'
TEXT = HEADER + "".join(ROW.format(item=k % 5, minute=k % 60, value=k / 4) for k in range(500))
SECRET = "98765"
BAD_KEYS = (f"3.{SECRET}", f"x{SECRET}", "3" * 20, "")


def read(database, path, keep="true", columns=COLUMNS):
    database.run("DROP TABLE IF EXISTS cells")
    file = tables.open_table(database, path, columns)
    keep = keep.format(item=cells.KEY.typed(file.raw("item")))
    keys = [name for name in ("item", "subject") if name in columns]
    tables.load_table(database, "cells", file, columns, [keep], keys=keys)
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


def test_commas_within_texts_hide_no_header_below_a_title(database, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('Report\n\nitem;unit;note\n1;mg;"a, b, c, d"\n2;mg;none\n')
    file = tables.open_table(database, path, {})
    assert (file.separator, file.header) == (";", ["item", "unit", "note"])
    assert read(database, path, columns={"item": cells.KEY})["item"].tolist() == [1, 2]


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


CELLS = [
    (cells.Number(), [" 2.5 ", "", "NaN"], [2.5, None, None]),
    (cells.Whole(), ["1.0", "007", ""], [1, 7, None]),
    (cells.Label(), ["1.0", "False", ""], [1, 0, None]),
    (cells.Word(), [" mg ", "", "x" * 301], ["mg", "", "x" * 300]),
    (cells.Id(), ["10001.0", "001", "1.5", "a.0"], ["10001", "1", "1.5", "a.0"]),
    (cells.Counted("hours"), ["0.5", "24"], ["1970-01-01 00:30:00", "1970-01-02 00:00:00"]),
    (cells.Time(), ["2150-01-01T10:00:00.75"], ["2150-01-01 10:00:00"]),
    (
        cells.Instant(zoned=True),
        ["2024-04-01T08:00:00+01:00", "2024-04-01T08:00:00+0100", "2024-04-01 07:00Z"],
        ["2024-04-01 07:00:00"] * 3,
    ),
    (cells.Instant(), [" 2150-01-01 9:30:00.25 "], ["2150-01-01 09:30:00.250000"]),
]


@pytest.mark.parametrize(("form", "texts", "expected"), CELLS)
def test_cells_of_each_form_are_typed(form, texts, expected, database, tmp_path):
    """An empty cell is missing, a NaN is no number above all others."""
    path = tmp_path / "t.parquet"
    pd.DataFrame({"x": texts, "k": range(len(texts))}).to_parquet(path)
    read(database, path, columns={"k": cells.KEY, "x": replace(form, may_be_empty=True)})
    found = database.run("SELECT x FROM cells ORDER BY k").fetchall()
    assert [str(x) if hasattr(x, "year") else x for (x,) in found] == expected


ZONES = ["09:30 PM", "09:30:00 EST", "09:30 America/New_York", "09:30:00+02:00", "09:30:00Z"]


@pytest.mark.parametrize("form", [cells.Time(), cells.Instant()])
def test_a_time_with_a_zone_or_words_is_refused(form, database, tmp_path):
    wrong = [*(f"2150-01-01 {zone}" for zone in ZONES), "epoch", "infinity"]
    table = pd.DataFrame({"time": ["2150-01-01 9:30", *wrong]})
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(InputError, match=rf"{name}, column time: 7 cells "):
            read(database, tmp_path / name, columns={"time": form})


# --------------------------------------------------------------------------- forms of times

MOMENT = pd.Timestamp("2024-01-20 08:00")
EARLY = pd.Timestamp("2024-03-04 08:00")  # either may be the month
AMERICAN = "%m/%d/%Y %H:%M", "%m/%d/%Y %I:%M %p"


def times_of(database, folder, texts, *formats):
    """The first time of a column, and how it is read."""
    pd.DataFrame({"t": texts}).to_csv(folder / "t.csv", index=False, sep=";")
    file = tables.open_table(database, folder / "t.csv", {})
    form = tables.find_time(database, file, "t", formats, ())
    (first,) = database.row(f"SELECT min({form.typed(file.raw('t'))}) FROM {file.rows()}")
    return first, form


@pytest.mark.parametrize(
    "form",
    [
        *("%Y-%m-%d %H:%M:%S", "%d.%m.%Y %H:%M", "%-d/%-m/%Y %H:%M", "%d-%m-%Y %H:%M:%S"),
        *("%-m/%-d/%Y %-I:%M %p", "%m/%d/%Y %H:%M", "%m-%d-%Y %I:%M %p", "%-m/%-d/%Y %-I:%M%p"),
        *("%Y/%m/%d %H:%M", "%m/%d/%y %H:%M", "%d-%b-%Y %H:%M"),  # the year 2024, not 24
    ],
)
def test_times_are_read_in_the_usual_forms(form, database, tmp_path):
    assert times_of(database, tmp_path, [MOMENT.strftime(form)])[0] == MOMENT


@pytest.mark.parametrize(
    ("given", "form"),
    [
        (AMERICAN[0], AMERICAN[1]),
        (AMERICAN[1], AMERICAN[0]),
        ("%d/%m/%Y %H:%M", "%d/%m/%Y %I:%M %p"),
        ("%d.%m.%Y %H:%M", "%d/%m/%Y %H:%M"),
        ("%Y%m%d%H%M", "%Y%m%d%H%M"),
        ("%Y%m%d%H%M", "%Y-%m-%d %H:%M:%S"),
        ("%d/%m/%Y", "%d.%m.%Y %H:%M"),
    ],
)
def test_a_format_of_one_column_tells_of_another_what_comes_first(given, form, database, tmp_path):
    assert times_of(database, tmp_path, [EARLY.strftime(form)], given)[0] == EARLY


def test_one_late_day_of_a_long_column_decides(database, tmp_path):
    texts = ["3/4/2024"] * 1500
    with pytest.raises(
        OpenQuestions, match=r"t\.csv, column t: .*month may.*--time_format"
    ) as found:
        times_of(database, tmp_path, texts)
    asked = [question.answers for question in found.value.questions]
    assert asked == [("%d/%m/%Y", "%m/%d/%Y")]
    assert times_of(database, tmp_path, [*texts, "3/14/2024"])[1].formats[0] == "%m/%d/%Y"
    with pytest.raises(OpenQuestions, match=r"t\.csv, column t: 1 cell .*--time_format"):
        times_of(database, tmp_path, [*texts, "3/14/2024", "14/3/2024"])
