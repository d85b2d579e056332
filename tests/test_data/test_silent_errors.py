"""What from_long would read wrong in silence: each rule on whole commands and a small export."""

import itertools
import json
import re

import numpy as np
import pandas as pd
import pytest

import dataset_format
from medgemma_clinical.data.importers import duck

pytestmark = pytest.mark.slow

ADMITTED = pd.Timestamp("2024-03-02 08:00")
LACTATE, CRP = "Laktat [mmol/l]", "CRP (mg/l)"
SERIES = (f"Laktat [mmol/l]={LACTATE}", f"CRP [mg/l]={CRP}")


def export(folder, sep=";", **people):
    """Forty patients with two lactates and a CRP each; keywords are columns of the patients."""
    rng, lines = np.random.default_rng(5), []
    for p in range(40):
        for hour, item, level in ((1, LACTATE, 1.0), (9, LACTATE, 1.2), (5, CRP, 20.0)):
            text = f"{level * np.exp(0.5 * rng.normal()):.1f}".replace(".", ",")
            lines.append((f"{p:08d}", ADMITTED + pd.Timedelta(hour, "h"), item, text))
    labs = pd.DataFrame(lines, columns=["PID", "Zeit", "Untersuchung", "Ergebnis"])
    table = {"PID": [f"{p:08d}" for p in range(40)], "Aufnahme": ADMITTED, "tot": [*"jnnn"] * 10}
    table |= {"Alter": range(40, 80), **people}
    write(folder, labs, sep)
    pd.DataFrame(table).replace({"j": "ja", "n": "nein"}).to_csv(
        folder / "patients.csv", index=False, sep=sep
    )
    return labs


def write(folder, labs, sep=";"):
    labs.to_csv(folder / "labs.csv", index=False, sep=sep)


@pytest.fixture
def make(tmp_path, capsys):
    """Return the exit code, what was said, and the rows and description that were written."""

    def run(*flags, out="out.csv", series=SERIES):
        capsys.readouterr()
        code = dataset_format.main(words_of(tmp_path, *flags, out=out, series=series))
        said = "".join(capsys.readouterr())
        if code or "--preview" in flags:
            return code, said, None, None
        return code, said, *read(tmp_path / out)

    return run


def words_of(folder, *flags, out="out.csv", series=SERIES):
    words = [f"--table={folder / 'labs.csv'}", f"--labels={folder / 'patients.csv'}"]
    words += ["--columns", "subject_id=PID", "time=Zeit", "item=Untersuchung"]
    words += ["value=Ergebnis", "label=tot", "--prediction_time=Aufnahme + 24 h"]
    return [
        "from_long",
        *words,
        f"--out={folder / out}",
        *(f"--series={x}" for x in series),
        *flags,
    ]


def read(path):
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    return rows, json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The rows of the export as it is."""
    folder = tmp_path_factory.mktemp("plain")
    export(folder)
    assert dataset_format.main(words_of(folder)) == 0
    return read(folder / "out.csv")[0]


# --------------------------------------------------------------------------- flags of a laboratory


MARKS = (
    "{} +",
    "{} ++",
    "{} -",
    "{} H",
    "{}H",
    "{} HH",
    "{} LL",
    "{}*",
    "{} !",
    "{} (L)",
    "{} [H]",
)
MARKS += ("{} ↑", "↓ {}", "{} H*", "* {}")


def test_a_number_with_a_laboratory_s_flag_is_the_number(make, plain, tmp_path):
    labs = export(tmp_path)
    flagged = labs["Ergebnis"].str.replace(",", ".").astype(float) > 1
    marks = itertools.cycle(MARKS)
    labs.loc[flagged, "Ergebnis"] = [next(marks).format(x) for x in labs["Ergebnis"][flagged]]
    write(tmp_path, labs)
    code, said, rows, about = make()
    assert code == 0
    assert f"{flagged.sum()} numbers with a laboratory's flag" in said
    pd.testing.assert_frame_equal(rows, plain)
    assert about["dropped"] == {}


@pytest.mark.parametrize("mark", ["{} L", "{} (C)", "{}g"])
def test_a_letter_that_may_be_a_unit_is_a_question(mark, make, plain, tmp_path):
    labs = export(tmp_path)
    labs.loc[:9, "Ergebnis"] = labs.loc[:9, "Ergebnis"].map(mark.format)
    write(tmp_path, labs)
    letter = re.sub(r"\W", "", mark)
    code, said, *_ = make("--bad_values=drop")
    assert (code, f"--result_flags {letter}" in said) == (2, True)
    pd.testing.assert_frame_equal(make("--result_flags", letter)[2], plain)


@pytest.mark.parametrize(
    ("mark", "chosen", "end"),
    [
        ("{} ?", lambda x: x > 1.2, "high"),
        ("{} ?", lambda x: x.index % 7 == 0, ""),
        ("unlesbar", lambda x: x > 1.2, ""),
    ],
)
def test_what_begins_with_a_number_is_listed_and_a_check_says_what_a_series_lost(
    mark, chosen, end, make, tmp_path, capsys
):
    labs = export(tmp_path)
    numbers = labs["Ergebnis"].str.replace(",", ".").astype(float)
    dropped = pd.Series(chosen(numbers), labs.index) & (labs["Untersuchung"] == LACTATE)
    labs.loc[dropped, "Ergebnis"] = labs["Ergebnis"][dropped].map(mark.format)
    write(tmp_path, labs)
    assert make()[0] == 2
    code, said, _, about = make("--bad_values=drop")
    warned = [line for line in said.splitlines() if "warning" in line and "dropped" in line]
    assert code == 0
    if "{}" in mark:
        share = f"{dropped.sum()} cells that begin with a number ({dropped.mean():.1%})"
        assert [share in line and '"#,# ?"' in line for line in warned] == [True]
    else:
        assert warned == []
    share = dropped.sum() / (labs["Untersuchung"] == LACTATE).sum()
    assert about["dropped"] == {"Laktat": {"share": pytest.approx(share, abs=1e-4), "end": end}}
    capsys.readouterr()
    assert dataset_format.main(["check", str(tmp_path / "out.csv")]) == 0
    line = f"Laktat: {about['dropped']['Laktat']['share']:.1%} of its values were not read"
    line += f"; those that begin with a number lie at its {end} end" if end else ""
    assert f"{line}\n" in capsys.readouterr().out


# --------------------------------------------------------------------------- units and factors


def test_factors_are_checked_after_they_are_applied(make, plain, tmp_path):
    labs = export(tmp_path)
    labs["Einheit"] = np.where(labs["Untersuchung"] == CRP, "mg/l", "mmol/l")
    is_other = (labs["Untersuchung"] == CRP) & (labs.index % 2 == 0)
    labs.loc[is_other, "Einheit"] = "mg/dl"
    numbers = labs["Ergebnis"][is_other].str.replace(",", ".").astype(float) / 10
    labs.loc[is_other, "Ergebnis"] = numbers.map("{:.2f}".format).str.replace(".", ",")
    write(tmp_path, labs)
    unit = "--columns=unit=Einheit"
    assert make(unit)[0] == 2
    code, said, *_ = make(unit, f"--factor={CRP}:mg/dl=1")
    assert code == 2
    assert all(text in said for text in ("CRP", "in mg/l", "in mg/dl", "--factor"))
    pd.testing.assert_frame_equal(make(unit, f"--factor={CRP}:mg/dl=10")[2], plain)


@pytest.mark.parametrize(
    ("item", "unit"),
    [
        ("CRP (mg/l)", "mg/l"),
        ("Leuko (10*3/\u00b5l)", "10*3/\u00b5l"),
        ("Thrombo [/nl]", "/nl"),
        ("O2 (%)", "%"),
        ("CRP (Serum)", ""),
        ("Quotient (Blut/Serum)", ""),
    ],
)
def test_a_unit_in_parentheses_is_a_unit(item, unit, tmp_path):
    with duck.open_database(tmp_path / "out.csv", "100MB", 1) as database:
        assert database.row(f"SELECT unit_within('{item}')") == (unit,)


def test_a_series_of_another_unit_than_its_item_says_is_refused(make, tmp_path):
    export(tmp_path)
    assert "trajectory_X [mg/l]" in make(series=(SERIES[0], f"X={CRP}"))[2]
    assert make(series=(SERIES[0], f"X [kg/l]={CRP}"))[0] == 2


# --------------------------------------------------------------------------- times


def test_rows_whose_stay_ended_before_the_prediction_time_are_left_out(make, tmp_path):
    ends = [ADMITTED + pd.Timedelta(h, "h") for h in (23, 24, 200, 300)] * 10
    ends[2] = None
    export(tmp_path, Entlassung=ends)
    code, said, *_ = make("--preview")
    assert code == 0
    assert "--end_time 'Entlassung'" in said.partition("open questions")[2]
    assert len(make()[2]) == 40, "nothing is left out unasked"
    _, _, rows, about = make("--end_time=Entlassung")
    assert [int(x) % 4 for x in rows["subject_id"]] == [1, 2, 3] * 10
    assert about["flow"][0] | {"rule": ""} == {
        "rule": "",
        "removed": 10,
        "left": 30,
        "patients": 30,
    }
    # New patients may still be there: the column may be missing, and who left has no row.
    like = [f"--like={tmp_path / 'out.csv'}", "--no_labels"]
    assert len(make(*like, out="new.csv")[2]) == 30
    export(tmp_path)
    assert len(make(*like, out="new.csv")[2]) == 40


def test_an_end_without_a_time_is_the_end_of_its_day(make, tmp_path):
    """Who left on the day of the prediction may have been there, the day before not."""
    export(tmp_path, Entlassung=["2024-03-02", "2024-03-03", "2024-03-04", ""] * 10)
    _, _, rows, _ = make("--end_time=Entlassung")
    assert [int(x) % 4 for x in rows["subject_id"]] == [1, 2, 3] * 10


def test_a_preview_asks_for_the_end_beside_the_time_it_proposes(make, tmp_path):
    """The earlier of two times near the values is the admission, a birth lies years off."""
    ends = [ADMITTED + pd.Timedelta(6 + p, "h") for p in range(40)]
    export(tmp_path, Austritt=ends, Geburt=["1950-03-02"] * 40)
    _, said, *_ = make("--prediction_time=", "--preview")
    asked = said.partition("open questions")[2]
    assert "--prediction_time 'Aufnahme + 24 h'" in asked


def test_different_values_of_one_time_are_a_question(make, tmp_path):
    """What each answer makes of them, a loop over all events tells in test_events."""
    labs = export(tmp_path)
    labs["Freigabe"] = labs["Zeit"] + pd.Timedelta("1h")
    again = labs[:3].assign(Freigabe=labs["Zeit"] + pd.Timedelta("2h"), Ergebnis="9,9")
    late = labs[3:5].assign(Freigabe=labs["Zeit"] + pd.Timedelta("99h"), Ergebnis="9,9")
    same = labs[6:9].assign(Freigabe=labs["Zeit"] + pd.Timedelta("3h"))
    stored = "--columns=storetime=Freigabe"
    write(tmp_path, pd.concat([labs, late, same]))
    assert make(stored)[0] == 0, "a later correction is not known, and equal values are one"
    write(tmp_path, pd.concat([labs, again, late, same]))
    code, said, *_ = make(stored)
    assert code == 2
    assert "3 times" in said
    assert "--equal_times 'last' (or mean, keep)" in make(stored, "--preview")[1]


# --------------------------------------------------------------------------- patients


def test_ids_keep_their_zeros_and_join_without_them(make, tmp_path):
    labs = export(tmp_path)
    write(tmp_path, labs.assign(PID=labs["PID"].str.lstrip("0").replace("", "0")))
    _, said, rows, _ = make()
    assert "leading zeros" not in said
    assert rows["subject_id"].tolist() == [f"{p:08d}" for p in range(40)]
    assert [x.split()[0] for x in rows["id"]] == rows["subject_id"].tolist()
    labs.loc[3:4, "PID"] = "1"
    write(tmp_path, labs)
    assert "column PID: ids that differ in leading zeros alone, taken as one: 1\n" in make()[1]


@pytest.mark.parametrize("codes", [("0", "1"), ("1", "2", "9")])
def test_sex_by_number_is_a_question_and_never_a_number(codes, make, tmp_path):
    cells = [codes[p % len(codes)] for p in range(40)]
    export(tmp_path, Geschlecht=cells)
    static = "--static=sex=Geschlecht"
    code, said, *_ = make(static)
    assert code == 2
    assert f"--sex {codes[0]}=" in said
    assert ("9=unknown" in said) == ("9" in codes)
    meaning = dict(zip(codes, ("female", "male", "unknown"), strict=False))
    words = ["--sex", *(f"{word}={sex}" for word, sex in meaning.items())]
    _, _, rows, _ = make(static, *words)
    male = {"female": "0", "male": "1", "unknown": ""}
    assert rows["static_sex_male"].tolist() == [male[meaning[x]] for x in cells]
    _, _, new, _ = make(f"--like={tmp_path / 'out.csv'}", "--no_labels", out="new.csv")
    assert new["static_sex_male"].tolist() == rows["static_sex_male"].tolist()


def test_the_outcome_names_the_event_of_times(make, tmp_path):
    ends = [ADMITTED + pd.Timedelta(30 + p, "h") for p in range(40)]
    export(tmp_path, Ende=ends, Grund=[*("icu", "discharge")] * 20)
    words = ["--event_time=Ende", "--event=Grund", "--event_names", "icu", "discharge"]
    _, _, _, about = make(*words, "--outcome=ICU transfer")
    assert about["events"] == {"1": "ICU transfer", "2": "discharge"}
    dataset = dataset_format.MIMICtrajectoryDataset(
        tmp_path / "out.csv", outcome_kind="time", horizon_hours=[48]
    )
    assert dataset.outcome == "ICU transfer"
    assert dataset.competing_events.names[0] == "ICU transfer"


# --------------------------------------------------------------------------- forms of an export


@pytest.mark.parametrize("sep", ["|", ","])
def test_lines_above_the_header_are_left_out(sep, make, plain, tmp_path):
    export(tmp_path)
    for quoting, name in ((0, "labs.csv"), (1, "patients.csv")):
        table = pd.read_csv(tmp_path / name, sep=";", dtype=str)
        text = table.to_csv(index=False, sep=sep, quoting=quoting)
        above = f"Export of 2024{sep * 3}\nby Z{sep * 3}\n\n"
        (tmp_path / name).write_text(above + text, encoding="utf-8")
    _, said, rows, _ = make("--decimal=comma")
    assert said.count("3 lines above the header are left out") == 2
    pd.testing.assert_frame_equal(rows, plain)
    # A damaged line is still found where it is.
    lines = (tmp_path / "labs.csv").read_text(encoding="utf-8").splitlines()
    lines[40] += f"{sep}one cell too many"
    (tmp_path / "labs.csv").write_text("\n".join(lines), encoding="utf-8")
    code, said, *_ = make("--decimal=comma")
    assert code == 2
    assert "labs.csv, line 41: " in said


def test_times_of_several_forms_are_asked_for_with_the_formats_that_read_all(make, plain, tmp_path):
    labs = export(tmp_path)
    german = labs["Zeit"].dt.strftime("%d.%m.%Y %H:%M")
    other = labs["Zeit"].dt.strftime("%Y-%m-%d %H:%M:%S")
    write(tmp_path, labs.assign(Zeit=german.where(labs.index % 3 > 0, other)))
    code, said, *_ = make()
    assert code == 2
    answer = ["--time_format=%Y-%m-%d %H:%M:%S", "--time_format=%d.%m.%Y %H:%M"]
    assert all(text.partition("=")[2] in said for text in answer)
    assert "'%Y-%m-%d %H:%M:%S', '%d.%m.%Y %H:%M'" in make("--preview")[1]
    pd.testing.assert_frame_equal(make(*answer)[2], plain)


def test_excel_s_serial_numbers_of_times_are_read(make, plain, tmp_path):
    pytest.importorskip("openpyxl")
    labs = export(tmp_path)
    people = pd.read_csv(tmp_path / "patients.csv", sep=";", dtype=str)
    people["Aufnahme"] = pd.to_datetime(people["Aufnahme"])
    day = pd.Timestamp("1899-12-30")
    for table, column, name in ((labs, "Zeit", "labs"), (people, "Aufnahme", "patients")):
        table[column] = (table[column] - day) / pd.Timedelta("1D")
        with pd.ExcelWriter(tmp_path / f"{name}.xlsx") as book:
            table.to_excel(book, index=False, startrow=2)
            book.sheets["Sheet1"].cell(1, 1, "Export of 2024")
    words = [
        f"--{name}={tmp_path / file}" for name, file in (("table", "labs"), ("labels", "patients"))
    ]
    _, _, rows, _ = make("--decimal=comma", *(f"{word}.xlsx" for word in words))
    pd.testing.assert_frame_equal(rows, plain)
