"""from_long on what people hold: a laboratory's export and a list of patients, each as it is."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dataset_format
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data import roles
from medgemma_clinical.data.importers import output
from medgemma_clinical.data.small_cells import MIN_CELL
from medgemma_clinical.files import InputError
from table_requests import make_rows

pytestmark = pytest.mark.slow
pytest.importorskip("openpyxl")

START = pd.Timestamp("2024-01-20 08:00")
SERIES = ("creatinine [mg/dL]=Creatinine",)
STATIC = ("age [years]=Age (years)", "sex=Sex")
FLAGS = {
    "series": SERIES,
    "columns": ("label=AKI stage 3",),
    "prediction_time": "Admitted + 48 h",
    "window_hours": 48.0,
}
PREDICTED = ("--prediction_time=Admitted + 48 h", "--window_hours=48")
AMERICAN = "%-m/%-d/%Y %-I:%M %p"


def labs(*cells, patients=2):
    """One value every 12 hours of each patient, the first at admission: 1, 1.5 and the cells."""
    values = ["1", "1.5", *cells]
    times = [START + pd.Timedelta(12 * k, "h") for k in range(len(values))]
    return pd.DataFrame(
        [
            (f"P{p}", t, "Creatinine", v)
            for p in range(patients)
            for t, v in zip(times, values, strict=True)
        ],
        columns=["Patient", "Collected", "Analyte", "Result"],
    )


def people(patients=2, **columns):
    table = pd.DataFrame({"Patient": [f"P{p}" for p in range(patients)], "Admitted": START})
    return table.assign(**{"Age (years)": 50, "Sex": "F", "AKI stage 3": "No", **columns})


def written(table, form):
    """The table with its times as texts of a form."""
    times = table.select_dtypes("datetime")
    return table.assign(**{name: times[name].dt.strftime(form) for name in times})


def save(table, path, **options):
    if path.suffix == ".xlsx":
        table.to_excel(path, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, **options)
    return path


@pytest.fixture
def make(tmp_path):
    """Rows and description of two tables."""

    def make_them(table, patients, ending=".csv", sep=",", **flags):
        paths = {"table": tmp_path / f"labs{ending}", "labels": tmp_path / f"patients{ending}"}
        save(table, paths["table"], sep=sep)
        save(patients, paths["labels"], sep=sep)
        return make_rows("from_long", **paths, out=tmp_path / "out.csv", **{**FLAGS, **flags})

    return make_them


def trajectory(made):
    rows, _ = made
    return rows["clinical_trajectory"].tolist()[0]


# --------------------------------------------------------------------------- lines and columns


def test_lines_that_appear_twice_are_dropped_with_a_count(make, caplog):
    """Lines that differ in any column are different measurements, whatever is read of them."""
    caplog.set_level(logging.INFO)
    table = labs("2", patients=1).assign(Sample=range(3))
    again = pd.concat([table, table, table[:1], table[2:].assign(Sample=9)])
    made = make(again, people(1))
    assert trajectory(made) == "1 (0h) -> 1.5 (12h) -> 2 (24h) -> 2 (24h)"
    assert made[1]["values"]["repeated"] == 4
    assert "4 lines are repeated" in caplog.text


def test_what_a_window_loses_is_counted_with_its_events(make, caplog):
    caplog.set_level(logging.INFO)
    late = START + pd.Timedelta("9D")
    patients = people(4, Admitted=[START, late, START, late], **{"AKI stage 3": list("1100")})
    make(labs(patients=4), patients)
    (said,) = [line for line in caplog.messages if "--window_hours" in line]
    assert re.findall(r"(\d+) of (\d)", said) == [("2", "4"), ("2", "4"), ("1", "2")]


@pytest.mark.parametrize(
    "names",
    [
        ("subject_id", "charttime", "itemid", "valuenum"),
        ("PATIENT ID", "Date", "Test_Name", "Result (mg/dL)"),
    ],
)
def test_columns_are_found_by_their_usual_names(names, make):
    table = labs().set_axis(names, axis="columns").assign(comment="x")
    assert trajectory(make(table, people())) == "1 (0h) -> 1.5 (12h)"


def test_all_missing_columns_are_asked_for_in_one_line(make):
    table = labs().rename(columns={"Collected": "When", "Analyte": "What"})
    with pytest.raises(InputError) as caught:
        make(table, people(), columns=(), prediction_time="")
    for asked in ("time=? item=?: ", "prediction_time=? label=?", "When", "--no_labels"):
        assert asked in str(caught.value)
    columns = ("time=When", "item=What,label=AKI stage 3")
    assert trajectory(make(table, people(), columns=columns)) == "1 (0h) -> 1.5 (12h)"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"prediction_time": "Admitted", "window_hours": 1.0}, None),
        (
            {"columns": (*FLAGS["columns"], "prediction_time=Early"), "prediction_time": ""},
            "4 after",
        ),
        ({"columns": (*FLAGS["columns"], "labels.subject_id=Other")}, "named alike"),
        ({"series": ("x=nothing",)}, "--series"),
    ],
)
def test_the_cause_of_no_value_in_a_window_is_the_true_one(change, cause, make):
    patients = people(Early=START - pd.Timedelta("1h"), Other=["A", "B"])
    if cause is None:
        assert trajectory(make(labs(), patients, **change)) == "1 (1h)"
    else:
        with pytest.raises(InputError, match=f"2 of the 2 subjects.*{cause}"):
            make(labs(), patients, **change)


@pytest.mark.parametrize(
    "header", [["Patient", "Collected", "Analyte", "Result"], ["item", "value"]]
)
def test_a_table_of_that_form_given_as_data_is_answered_by_the_command_to_type(header, tmp_path):
    path = save(labs().iloc[:, -len(header) :].set_axis(header, axis="columns"), tmp_path / "l.csv")
    for source in (path, pd.read_csv(path)):
        with pytest.raises(InputError) as caught:
            MIMICtrajectoryDataset(source)
        table = "TABLE.csv" if source is not path else path
        typed = f"from_long --preview --table {table} " in str(caught.value)
        assert typed == (len(header) == 4)


def test_a_name_is_found_whatever_its_case_and_signs_the_same_text_first():
    assert roles.find_column(["a b", "A_B (x)"], "A_B (x)") == "A_B (x)"
    assert roles.find_column(["a b", "A_B (x)"], "AB") == "a b"
    assert roles.find_column(["a"], "", "b") is None


@pytest.mark.parametrize(
    ("names", "flags", "ending", "place"),
    [
        (("Result", "Result"), (), ".csv", "labs.*, column Result: "),
        (("Result", "Result"), (), ".xlsx", "labs.*, column Result: "),
        (("Result (mg/dL)", "Result (mmol/L)"), (), ".csv", r"labs.*, column Result \(mg/dL\): "),
        (("Result (mg/dL)", "Result (mmol/L)"), ("value=Result (mmol/L)",), ".csv", ""),
        (("value", "Value"), (), ".csv", ""),  # the usual name itself
        (("Result", "Ward", "Ward"), (), ".csv", ""),
    ],
)
def test_a_column_that_is_read_has_a_name_of_its_own(names, flags, ending, place, make):
    table = labs().assign(**{f"other{k}": "9" for k in range(len(names) - 1)})
    table = table.set_axis([*table.columns[:3], *names], axis="columns")
    columns = (*FLAGS["columns"], *flags)
    if place:
        with pytest.raises(InputError, match=place):
            make(table, people(), ending, columns=columns)
    else:
        read = "9 (0h) -> 9 (12h)" if flags else "1 (0h) -> 1.5 (12h)"
        assert trajectory(make(table, people(), ending, columns=columns)) == read


LONG, WRONG_ID = 10**16 + 3, r"column Patient: \d cells? "


@pytest.mark.parametrize(
    ("ids", "ending", "place"),
    [
        (["x" * 301, "x" * 302], ".csv", WRONG_ID),
        (["A\tB", "C"], ".csv", WRONG_ID),
        (["1,2E+16", "1"], ".csv", WRONG_ID),
        ([LONG, LONG + 16], ".xlsx", "column Patient: "),
        (["x" * 299 + "1", "x" * 299 + "2"], ".csv", ""),
        ([str(LONG), str(LONG + 1)], ".xlsx", ""),
        ([LONG, LONG + 1], ".csv", ""),
    ],
)
def test_a_patient_keeps_the_whole_of_an_id_or_is_refused(ids, ending, place, make):
    table, patients = labs(), people()
    table["Patient"] = table["Patient"].map(dict(zip(patients["Patient"], ids, strict=True)))
    patients["Patient"] = ids
    if not place:
        rows, _ = make(table, patients, ending)
        assert rows["subject_id"].tolist() == [*map(str, ids)]
        return
    for labels in (patients, people()):
        with pytest.raises(InputError, match=place):
            make(table, labels, ending)


# --------------------------------------------------------------------------- cells


def in_berlin(table, form="%Y-%m-%dT%H:%M:%S%z"):
    times = table.select_dtypes("datetime")
    zoned = {name: times[name].dt.tz_localize("Europe/Berlin") for name in times}
    return table.assign(**{name: zoned[name].dt.strftime(form) for name in zoned})


@pytest.mark.parametrize("form", ["%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%d at %H:%M:%S%z"])
def test_times_with_a_zone_count_true_hours_and_keep_their_zone(form, make):
    """The clocks of Berlin went forward on 31 March 2024 at 2."""
    start = pd.Timestamp("2024-03-30 08:00")
    table = labs("2", "3").assign(Collected=lambda t: t["Collected"] - START + start)
    flags = {"time_format": (form,)} if "at" in form else {}
    made = make(in_berlin(table, form), in_berlin(people(Admitted=start), form), **flags)
    assert trajectory(made) == "1 (0h) -> 1.5 (12h) -> 2 (23h) -> 3 (35h)"
    shown = "2024-04-01T08:00:00+0100"
    assert made[0]["prediction_time"].tolist() == [shown] * 2
    assert made[0]["id"].tolist() == [f"P0 {shown}", f"P1 {shown}"]


@pytest.mark.parametrize("zoned", ["patients", "cell"])
def test_times_with_a_zone_beside_others_without_are_refused(zoned, make):
    table, patients = labs(), people()
    if zoned == "patients":
        patients = in_berlin(patients)
    else:
        table = in_berlin(table)
        table.loc[1, "Collected"] = table.loc[1, "Collected"][:-5]
    with pytest.raises(InputError, match=r"(labs|patients).csv.* column (Collected|Admitted): "):
        make(table, patients)


def labels_of(rows, name):
    read = rows[name].astype(object)
    return read.where(read.notna(), None).tolist()


YES_AND_NO = {
    "a": (["No", "Yes", "", "yes"], [0, 1, None, 1]),
    "b": (["n", "Y", "?", "0"], [0, 1, None, 0]),
    "c": (["FALSE", "true", "0", "1.0"], [0, 1, 0, 1]),
    "d": (["nein", "Ja", "unbekannt", ""], [0, 1, None, None]),
    "e": (["non", "oui", "S\u00ed", "si"], [0, 1, 1, 1]),
}
CODED = {
    "a": (["home", "Died ", "ward", "?"], [0, 1, 0, None]),
    "b": (["1", "2", "3", "it's"], [0, 1, 0, 1]),
}


@pytest.mark.parametrize(
    ("columns", "positive"), [(YES_AND_NO, ()), (CODED, ("died", "2", "It's"))]
)
def test_labels_may_be_words(columns, positive, make):
    patients = people(4, **{name: cells for name, (cells, _) in columns.items()})
    flags = {"outcome_column": (*columns,), "columns": (), "positive": positive}
    rows, _ = make(labs(patients=4), patients, **flags)
    for name, (_, labels) in columns.items():
        assert labels_of(rows, "label_escalation" if name == "a" else f"label_{name}") == labels


@pytest.mark.parametrize(
    ("positive", "place"),
    [
        ((), "column AKI stage 3: 2 cells .*--positive"),
        (("dead",), "--positive dead: .*column AKI stage 3: "),
    ],
)
def test_words_of_a_label_that_nothing_explains_are_refused(positive, place, make):
    with pytest.raises(InputError, match=place):
        make(labs(), people(**{"AKI stage 3": ["home", "died"]}), positive=positive)


UNCLEAR = "column Result: .*--decimal"
DROP = {"bad_values": "drop"}
PH = "7.35 (0h) -> 7.412 (12h) -> 7.3 (24h)"
THREE_DIGITS = "column Result: .* of Creatinine .*--decimal"


@pytest.mark.parametrize(
    ("sep", "cells", "flags", "read"),
    [
        (";", ("2,25", "<0,5"), {}, "2.25 (24h) -> 0.25 (36h)"),
        ("\t", ("2.25", "7"), {}, "2.25 (24h) -> 7 (36h)"),
        (";", ("4,1", "s. Bem."), DROP, "1 (12h) -> 4.1 (24h)"),
        (";", ("0,250", "900"), {}, "0.25 (24h) -> 900 (36h)"),
        (";", ("1,250", "1,5"), {}, "1.25 (24h) -> 1.5 (36h)"),
        (";", ("4,1 mmol/L", "900"), DROP, "column Result: 2 cells are with a unit"),
        (";", ("<12%", "9"), DROP, "column Result: 2 cells are with a unit"),
        (";", ("2 x positive", "9"), DROP, "1 (12h) -> 9 (36h)"),
        (";", ("2,25", "2.25"), {}, UNCLEAR),
        (",", ("2,25", "7"), {}, UNCLEAR),  # within quotes
        (",", ("2,250", "7"), {"decimal": "point"}, "2250 (24h) -> 7 (36h)"),
        (";", ("1,250", "900"), {}, THREE_DIGITS),
        (";", ("1.234", "900"), DROP, THREE_DIGITS),
        (",", ("1.234", "900"), {}, THREE_DIGITS),
        (";", ("1,250", "900"), {"decimal": "comma"}, "1.25 (24h) -> 900 (36h)"),
        (";", ("1,250", "1,250.5"), {"decimal": "point"}, "1250 (24h) -> 1250.5 (36h)"),
        (";", ("<1.234", "4,5"), {"decimal": "comma"}, "617 (24h) -> 4.5 (36h)"),
        (";", ("150.000", "250.000", "180.000"), {}, UNCLEAR),  # nothing else has decimals
        (";", ("7,350", "7,412", "7,300"), {}, PH),  # potassium has
        (",", ("1,234,567", "7"), DROP, UNCLEAR),
        (",", ("1 234", "7"), {"decimal": "point"}, "1234 (24h) -> 7 (36h)"),
        (";", ("4.1", "4,5"), {"decimal": "comma"}, "column Result: 2 cells look like numbers"),
        (";", ("4.1", "4,5"), {"decimal": "comma", **DROP}, "1 (12h) -> 4.5 (36h)"),
    ],
)
def test_decimals_and_thousands_are_read_as_said_or_as_nothing_contradicts(
    sep, cells, flags, read, make
):
    """An item with decimals says nothing of the thousands of another."""
    potassium = labs("5.1" if "." in cells[0] else "5,1", patients=1).iloc[2:]
    table = labs(*cells).replace({"1.5": "1"})
    if len(cells) == 3:
        table = table[table["Collected"] < START + pd.Timedelta("36h")].assign(Result=[*cells] * 2)
    if sep == ";" and read in (THREE_DIGITS, PH):
        table = pd.concat([table, potassium.assign(Analyte="Potassium")])
    flags = {"sep": sep, "below_limit": "half", "series": (*SERIES, "K=Potassium"), **flags}
    if read.startswith("column"):
        with pytest.raises(InputError, match=read):
            make(table, people(), **flags)
    else:
        assert trajectory(make(table, people(), **flags)).endswith(read)


@pytest.mark.parametrize(
    ("flags", "read"),
    [
        ({"below_limit": "half", **DROP}, "0.15 (24h) -> 500 (36h)"),
        ({"below_limit": "value", **DROP}, "0.3 (24h) -> 500 (36h)"),
        ({"below_limit": "drop", **DROP}, "1.5 (12h)"),
        (DROP, "4 cells are at a limit: --below_limit"),
        ({"below_limit": "half"}, "2 cells are not a number: --bad_values"),
    ],
)
def test_limits_and_other_texts_are_read_as_the_flags_say(flags, read, make, caplog):
    caplog.set_level(logging.INFO)
    table = labs("< 0.3", ">=500", "hemolyzed", "")
    if "cells" in read:
        with pytest.raises(InputError, match=read) as caught:
            make(table, people(), **flags)
        assert "hemolyzed" not in str(caught.value)
        return
    made = make(table, people(), **flags)
    assert trajectory(made).endswith(read)
    assert made[1]["values"]["without a number"] == 2 + 4 * (flags["below_limit"] == "drop")
    assert "dropped 2 other texts" in caplog.text


@pytest.mark.parametrize("ending", [".xlsx", ".parquet"])
def test_a_number_that_is_stored_as_such_has_no_sign_to_ask_for(ending, make):
    """A table with decimal commas may come with an Excel file of patients."""
    table = labs(patients=1).assign(Result=[1.234, 900])
    made = make(table, people(1, BMI=24.125), ending, static=("bmi=BMI",), decimal="comma")
    assert trajectory(made) == "1.234 (0h) -> 900 (12h)"
    assert made[0]["static_bmi"].tolist() == ["24.125"]


def german_export(patients=20):
    """A laboratory's table as texts, and the numbers that they stand for by patient and item."""
    rng, rows, numbers = np.random.default_rng(5), [], {}
    forms = {
        "Kalium": lambda x: f"{3 + 2 * x:.1f}",
        "pH": lambda x: f"{7.2 + x / 4:.3f}",  # always three digits
        "CK": lambda x: f"{round(2500 * x + 10):,}",  # thousands
        "CRP": lambda x: f"<{1 + x:.1f}" if x < 0.3 else f"{9 * x:.2f}",
    }
    for p in range(patients):
        for hours in np.sort(rng.choice(48, 9, replace=False)):
            item = [*forms][hours % 4]
            english = forms[item](rng.random())
            text, time = english.translate(str.maketrans(",.", ".,")), f"{hours} h"
            value = float(english.strip("<").replace(",", "")) / (1 + english.startswith("<"))
            numbers.setdefault((f"P{p}", item), []).append((int(hours), value))
            rows += [(f"P{p}", START + pd.Timedelta(time), item, text)] * rng.choice([1, 1, 2])
            rows.append((f"P{p}", START + pd.Timedelta(time), item, "s. Bem."))
    table = pd.DataFrame(rows, columns=["Pat.-Nr.", "Entnahme", "Parameter", "Ergebnis"])
    return table.sample(frac=1, random_state=1), numbers


@pytest.mark.parametrize(("ending", "sep"), [(".csv", ";"), (".xlsx", "")])
def test_an_export_with_every_trap_is_refused_or_read_right_in_each_cell(ending, sep, make):
    table, numbers = german_export()
    smoking = ["None", "NA", "Raucher", "nie"] * 5
    patients = people(20, Raucher=smoking).rename(columns={"Patient": "Pat.-Nr."})
    names = ("subject_id=Pat.-Nr.", "time=Entnahme", "item=Parameter", "value=Ergebnis")
    flags = {"columns": (*FLAGS["columns"], *names), "series": (), "static": ("smoking=Raucher",)}
    flags |= {"below_limit": "half", **DROP, "sep": sep}
    with pytest.raises(InputError, match=r"column Ergebnis: .*--decimal"):
        make(table, patients, ending, **flags)
    rows, about = make(table, patients, ending, decimal="comma", **flags)
    items = [about["series"], *(name[11:] for name in rows.filter(like="trajectory_"))]
    read = {}
    for row in rows.fillna("").to_dict("records"):
        for item, column in zip(items, rows.filter(like="trajectory"), strict=True):
            pairs = re.findall(r"([\d.]+) \(([\d.]+)h\)", row[column])
            if pairs:
                read[row["subject_id"], item] = [(int(h), float(v)) for v, h in pairs]
        static = {w: row[f"static_smoking {w.lower()}"] for w in {*smoking}}
        assert static == {w: str(int(w == smoking[int(row["id"][1:3])])) for w in {*smoking}}
    kept = {pair: values for pair, values in numbers.items() if (pair[0], items[0]) in numbers}
    assert read == kept
    assert about["values"]["repeated"] == table.duplicated().sum()


@pytest.mark.parametrize(
    ("patients", "said"),
    [
        (MIN_CELL, '22 values "see #", 13 other texts'),
        (MIN_CELL - 1, "32 other texts"),
    ],
)
def test_texts_that_are_dropped_are_named_where_many_patients_have_them(
    patients, said, make, caplog
):
    """Other texts may be remarks on a patient, though they stand at several values."""
    caplog.set_level(logging.INFO)
    table = labs("see 12", "see 4", "5 m\u00fcller", "x" * 31, patients=patients)
    table.loc[:1, "Result"] = "M\u00fcller called"
    times = {"window_hours": 999.0, "prediction_time": "Admitted + 9 d"}
    make(table, people(patients), **DROP, **times)
    assert f"column Result: dropped {said}" in caplog.text
    assert f'): {patients} values "# ..."' in caplog.text
    assert "ller" not in caplog.text


@pytest.mark.parametrize(
    ("units", "factor", "series", "read"),
    [
        (("MG/DL", "mg/dl"), (), (), "1 (0h) -> 1.5 (12h)"),
        (("\u00b5mol/L", "\u03bcmol/l"), ("creatinine:UMOL/L=9",), (), "1 (0h) -> 1.5 (12h)"),
        (("mg/dL", "umol/L"), ("creatinine:UMOL/l=2",), ("x=creatinine",), "1 (0h) -> 3 (12h)"),
        (("mg/dL", "mg/l"), (), ("x=creatinine",), "labs.csv: "),
        (("mg/dL", "mg/l"), (), (), "labs.csv: "),
    ],
)
def test_units_and_items_that_differ_in_case_alone_are_one(units, factor, series, read, make):
    table = labs().assign(Unit=[*units] * 2, Analyte=["Creatinine", "CREATININE"] * 2)
    flags = {"columns": (*FLAGS["columns"], "unit=Unit"), "series": series, "factor": factor}
    if read.startswith("labs"):
        with pytest.raises(InputError, match=read):
            make(table, people(), **flags)
    else:
        made = make(table, people(), **flags)
        assert trajectory(made) == read
        assert made[1]["unit"] in units


# --------------------------------------------------------------------------- static features


CATEGORIES = {
    "x": (["61", "70.5", ""], {"static_x [u]": ["61", "70.5", None]}),
    "a": (["Yes", "no", ""], {"static_a": ["1", "0", None]}),
    "b": (["ja", "Nein", ""], {"static_b": ["1", "0", None]}),
    "c": (["F", "male", "M"], {"static_c_male": ["0", "1", "1"]}),
    "d": (["W", "m\u00e4nnlich", "m"], {"static_d_male": ["0", "1", "1"]}),
    "e": (
        ["d", "m", "w"],
        {"static_e d": [*"100"], "static_e m": [*"010"], "static_e w": [*"001"]},
    ),
    "f": (["Ward", "ICU", "icu"], {"static_f ward": ["1", "0", "0"]}),
}


def test_static_features_are_numbers_or_columns_of_their_categories(make):
    cells = {f"Of {name}": cells for name, (cells, _) in CATEGORIES.items()}
    static = tuple(f"{name}{' [u]' * (name == 'x')}=of {name}" for name in CATEGORIES)
    rows, _ = make(labs(patients=3), people(3, **cells), static=static)
    read = rows.filter(like="static_").astype(object)
    expected = {name: x for _, columns in CATEGORIES.values() for name, x in columns.items()}
    assert read.where(read.notna(), None).to_dict("list") == expected


@pytest.mark.parametrize(
    ("name", "cells", "male"),
    [
        ("sex", ("m", "w", "d", ""), ["1", "0", None, None]),
        ("Gender", ("male", "female", "diverse", "M"), ["1", "0", None, "1"]),
        ("Geschlecht", ("Frau", "weiblich", "unbekannt", "F"), ["0", "0", None, "0"]),
        ("sex", ("femme", "homme", "mujer", "Donna"), ["0", "1", "0", "0"]),
    ],
)
def test_sex_is_one_column_whatever_its_words(name, cells, male, make):
    rows, _ = make(labs(patients=4), people(4, Sex=cells), static=(f"{name}=Sex",))
    static = rows.filter(like="static_").astype(object)
    assert static.where(static.notna(), None).to_dict("list") == {"static_sex_male": male}


def test_kept_columns_come_along_under_their_names(tmp_path, capsys):
    """They serve as sites, as ids, as another label and as a split, and are no input."""
    hospitals = ["St. Mary's", 'West, "new"', "", "Süd"]
    parts = ["train", "val", "test", "train"]
    kept = {"Hospital": hospitals, "split": parts, "Died <30d": [*"0110"]}
    old = people(4, **kept).assign(**{"Case number": ["007", "7b", "8", "9"]})
    paths = [save(labs(patients=4), tmp_path / "labs.csv"), save(old, tmp_path / "old.csv")]
    out = [str(tmp_path / name) for name in ("out.csv", "new.csv")]
    words = ["from_long", f"--table={paths[0]}", f"--labels={paths[1]}", f"--out={out[0]}"]
    words += ["--prediction_time=Admitted + 48 h", "--window_hours=48"]
    words += ["--columns", "label=AKI stage 3", "id=Case number"]
    words += ["--keep", "hospital", "split", "--keep", "Died <30d", "Case number"]
    assert dataset_format.main(words) == 0
    rows = pd.read_csv(out[0], dtype=str, keep_default_na=False)
    assert rows["id"].tolist() == ["007", "7b", "8", "9"]
    assert rows["Case number"].tolist() == ["007", "7b", "8", "9"]
    assert {name: rows[name].tolist() for name in kept} == kept
    dataset = MIMICtrajectoryDataset(out[0], label_column="Died <30d", site="Hospital")
    assert dataset.sites.tolist()[0] == "St. Mary's"
    assert dataset.labels.tolist() == [0, 1, 1, 0]
    assert dataset.ids.tolist() == ["007", "7b", "8", "9"]
    assert dataset.parts.tolist() == parts
    assert not dataset.static_names
    new = save(old.drop(columns=["Died <30d", "AKI stage 3"]), tmp_path / "new_people.csv")
    words = ["from_long", f"--table={paths[0]}", f"--labels={new}", f"--out={out[1]}"]
    assert dataset_format.main([*words, "--like", out[0], "--no_labels"]) == 0
    assert "--keep Died <30d: " in capsys.readouterr().out
    assert pd.read_csv(out[1])["Hospital"].tolist()[0] == "St. Mary's"


def test_further_outcomes_are_labels_that_the_trainer_reads(tmp_path):
    words_of = {"ICU <7d": ["ja", "nein", "ja", ""], "Died": ["Ja", "ja", "nein", "nein"]}
    old = people(4, **words_of).drop(columns="AKI stage 3")
    paths = [save(labs(patients=4), tmp_path / "labs.csv"), save(old, tmp_path / "old.csv")]
    out = [tmp_path / "out.csv", tmp_path / "like.csv", tmp_path / "new.csv"]
    words = ["from_long", f"--table={paths[0]}", f"--labels={paths[1]}"]
    flags = [*PREDICTED, "--positive=ja"]
    flags += ["--outcome_column=Died", "--outcome_column=icu <7d"]
    assert dataset_format.main([*words, *flags, f"--out={out[0]}"]) == 0
    assert dataset_format.main([*words, f"--like={out[0]}", f"--out={out[1]}"]) == 0
    for path in out[:2]:
        died = MIMICtrajectoryDataset(path)
        icu = MIMICtrajectoryDataset(path, label_column="label_icu_7d", require_labels=False)
        assert (died.outcome, icu.outcome) == ("Died", "ICU <7d")
        assert died.labels.tolist() == [1, 1, 0, 0]
        assert icu.labels.tolist()[:3] == [1, 0, 1]
        assert np.isnan(icu.labels[3])
    flags = [f"--outcome_column={name}" for name in ("Died", "ICU <7d")]
    coded = old.assign(**{"ICU <7d": ["1", "0", "0", ""]})  # in other words than the first outcome
    words[2] = f"--labels={save(coded, paths[1])}"
    assert (
        dataset_format.main([*words, *PREDICTED, "--positive=ja", *flags, f"--out={out[1]}"]) == 0
    )
    assert pd.read_csv(out[1])["label_icu_7d"].tolist()[:3] == [1, 0, 0]
    words[2] = f"--labels={save(old[['Patient', 'Admitted', 'Died']], paths[1])}"
    assert dataset_format.main([*words, f"--like={out[0]}", f"--out={out[2]}"]) == 0
    assert [*pd.read_csv(out[2]).filter(like="label")] == ["label_escalation"]
    words[2] = f"--labels={save(old[['Patient', 'Admitted']], tmp_path / 'new_people.csv')}"
    assert dataset_format.main([*words, f"--like={out[0]}", f"--out={out[2]}", "--no_labels"]) == 0
    assert not [*pd.read_csv(out[2]).filter(like="label")]


@pytest.mark.parametrize(
    ("names", "place"),
    [
        (("AKI stage 3", "Sepsis"), "--outcome_column Sepsis: .*patients.csv: "),
        (("AKI stage 3", "Died <7d", "Died >7d"), "--outcome_column Died >7d: .*patients.csv: "),
        (("AKI stage 3", "Words"), "patients.csv, column Words: 2 cells "),
    ],
)
def test_an_outcome_that_cannot_be_read_is_refused(names, place, make):
    columns = {name: "0" for name in names if name != "Sepsis"} | {"Words": "home"}
    with pytest.raises(InputError, match=place):
        make(labs(), people(**columns), columns=(), outcome_column=names)


@pytest.mark.parametrize(
    ("flags", "contexts", "zoned"),
    [
        ({"context_column": "Remark", "max_note_words": 1}, ["sepsis", ""], False),
        ({"notes": True}, ["Note (-2h): a b. Note (48h): c d", "Note (0h): e"], True),
        (
            {"notes": True, "context_column": "Remark", "max_note_words": 3},
            ["St. p. sepsis. Note (-2h): b. Note (48h): c d", "Note (0h): e"],
            False,
        ),
    ],
)
def test_texts_and_notes_become_the_context(flags, contexts, zoned, tmp_path, make):
    """A note counts if it was written by the prediction time, at 48 h, the newest words first."""
    lines = [("P0", 48, "c\nd"), ("P0", -2, "a b."), ("P0", 49, "late"), ("P1", 0, "e")]
    notes = pd.DataFrame(lines, columns=["MRN", "Written", "Text"])
    notes["Written"] = START + pd.to_timedelta(notes["Written"], "h")
    table, patients = labs(), people(Remark=["St. p.\nsepsis. ", ""])
    if zoned:
        notes, table, patients = map(in_berlin, (notes, table, patients))
    if flags.get("notes"):
        flags = {**flags, "notes": save(notes, tmp_path / "notes.csv")}
    columns = (*FLAGS["columns"], "notes.time=Written")
    rows, about = make(table, patients, columns=columns, **flags)
    assert rows["clinical_context"].tolist() == contexts
    assert ("notes/notes.csv" in about["tables_sha256"]) == ("notes" in flags)


@pytest.mark.parametrize(
    ("flags", "place"),
    [
        ({"context_column": "Remark"}, "--context_column Remark: .*patients.csv: "),
        ({"notes": "labs.csv"}, "labs.csv: --columns notes.text="),
        ({"notes": "none.csv"}, "none.csv: "),
        ({"context_column": "Sex", "keep": ("Clinical context",)}, "--keep Clinical context: "),
    ],
)
def test_a_text_that_cannot_be_found_is_refused(flags, place, tmp_path, make):
    if "notes" in flags:
        flags = {"notes": tmp_path / flags["notes"]}
    with pytest.raises(InputError, match=place):
        make(labs(), people(**{"Clinical context": "x"}), **flags)


@pytest.mark.parametrize("name", ["Ward", "id", "Trajectory_y", "label escalation"])
def test_a_column_is_kept_if_the_table_has_it_and_the_output_has_no_other(name, make):
    columns = {} if name == "Ward" else {name: "x"}
    with pytest.raises(InputError, match=rf"--keep {name}: .*patients.csv"):
        make(labs(), people(**columns), keep=(name,))


@pytest.mark.parametrize(
    ("static", "cells", "named"),
    [
        (("x=Nothing",), ["1", "1"], "--static x=Nothing"),
        (("x=Admitted",), ["1", "1"], "--static x=Admitted"),
        (("x=Sex", "y=Sex"), ["1", "1"], "--static y=Sex"),
        (("x=Other",), ["7", "some"], "column Other: 1 cell is not a number: --bad_values"),
        (("x=Other",), ["7", "<5"], "column Other: 1 cell is at a limit: --below_limit"),
    ],
)
def test_static_features_that_cannot_be_read_are_refused(static, cells, named, make):
    with pytest.raises(InputError, match=named):
        make(labs(), people(Other=cells), static=static)


@pytest.mark.parametrize(
    ("static", "cells", "name"),
    [
        (("x=Other",), ["grade 1", "grade=1", "no"], "static_x grade 1"),
        (("X b=Age (years)", "x=Other"), ["a", "b", "c"], "static_x b"),
    ],
)
def test_columns_of_one_name_are_refused(static, cells, name, make):
    with pytest.raises(InputError, match=f"column Other: {name} "):
        make(labs(patients=3), people(3, Other=cells), static=static)


def test_more_than_twenty_categories_are_no_category(make):
    for count in (20, 21):
        patients = people(count, Other=[f"w{k}" for k in range(count)])
        if count > 20:
            with pytest.raises(InputError, match="column Other: 21 different"):
                make(labs(patients=count), patients, static=("x=Other",))
        else:
            made = make(labs(patients=count), patients, static=("x=Other",))
            assert len(made[0].filter(like="static_").columns) == 20


@pytest.mark.parametrize(
    ("static", "warns"), [("x=Klinik", True), ("site=Sex", True), ("x=Sex", False)]
)
def test_a_hospital_among_the_static_features_brings_a_warning(static, warns, make, caplog):
    make(labs(), people(Klinik=["nord", "west"]), static=(static,))
    column = static.partition("=")[2]
    warnings = [text for text in caplog.messages if f"patients.csv, column {column}: " in text]
    assert [text.startswith("warning: ") for text in warnings] == [True] * warns


# --------------------------------------------------------------------------- new patients


def test_every_kind_of_file_gives_the_same_rows(make):
    flags = {"static": (*STATIC, "smoking=Smoking"), "below_limit": "half"}
    tables = labs("<0.3", patients=3), people(3, Smoking=["None", "NA", "Former"])
    expected, _ = make(*tables, **flags)
    words = {"static_smoking none", "static_smoking na", "static_smoking former"}
    assert words <= {*expected}, "None and NA are words"
    for ending in (".csv.gz", ".parquet", ".xlsx"):
        pd.testing.assert_frame_equal(make(*tables, ending, **flags)[0], expected)


@pytest.mark.parametrize(
    ("encoding", "flag", "place"),
    [
        *(("cp1252", "", ""), ("utf-8-sig", "cp1252", ""), ("utf-16", "", "")),
        ("mac_roman", "mac_roman", ""),
        ("gbk", "", "labs.csv.gz: "),
        ("cp1252", "cp9", "--encoding cp9: "),
    ],
)
def test_a_csv_is_read_in_the_encoding_that_it_has(encoding, flag, place, tmp_path):
    item = "\u4e02" if encoding == "gbk" else "Kreatinin [\u00b5mol/L] h\u00e4molytisch"
    table = labs().assign(Analyte=item).rename(columns={"Result": "R\u00e9sultat"})
    paths = {"table": tmp_path / "labs.csv.gz", "labels": tmp_path / "patients.csv"}
    for path, content in zip(paths.values(), (table, people()), strict=True):
        content.to_csv(path, index=False, encoding=encoding, sep=";")
    flags = {**FLAGS, "columns": ("value=R\u00e9sultat", "label=AKI stage 3")}
    flags |= {"series": (f"crea={item}",), "encoding": flag, "out": tmp_path / "out.csv"}
    if place:
        with pytest.raises(InputError, match=place):
            make_rows("from_long", **paths, **flags)
    else:
        assert trajectory(make_rows("from_long", **paths, **flags)) == "1 (0h) -> 1.5 (12h)"
    assert {*tmp_path.iterdir()} == {*paths.values()}


def test_excel_is_refused_in_one_line_where_it_cannot_be_read(tmp_path, make, monkeypatch):
    for error, named in ((ImportError, "pip install openpyxl"), (ValueError, "Excel")):

        def broken(*_, error=error, **__):
            raise error

        monkeypatch.setattr(pd, "ExcelFile", broken)
        paths = {"table": tmp_path / "labs.xlsx", "labels": tmp_path / "labs.xlsx"}
        paths["table"].write_bytes(b"PK\x05\x06" + bytes(18))  # an empty archive
        with pytest.raises(InputError, match=named):
            make_rows("from_long", **paths, out=tmp_path / "out.csv", **FLAGS)


@pytest.mark.parametrize(
    ("table", "labels", "sheets", "place"),
    [
        ("one.xlsx", "one.xlsx", ("Labs", "People"), ""),
        ("labs.csv", "one.xlsx", ("People",), ""),
        ("two.xlsx", "patients.xlsx", (), ""),  # the first of each
        ("wide.xlsx", "wide.xlsx", (), ""),
        ("labs.csv", "one.xlsx", (), "one.xlsx: .*prediction_time=.*--sheet.* Labs, People"),
        ("one.xlsx", "patients.xlsx", ("Labs",), "--sheet Labs: .*patients.xlsx: "),
    ],
)
def test_an_excel_file_is_read_at_the_sheet_of_its_turn(
    table, labels, sheets, place, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    info = pd.DataFrame({"Read me": ["of 2024"]})
    books = {
        "one.xlsx": {"Info": info, "Labs": labs(), "People": people()},
        "two.xlsx": {"Jan": labs(), "Feb": labs()},
        "patients.xlsx": {"Sheet1": people()},
        "wide.xlsx": {"All": labs(patients=1).join(people(1).drop(columns="Patient"))[:1]},
    }
    for name, tables in books.items():
        with pd.ExcelWriter(tmp_path / name) as book:
            for sheet, content in tables.items():
                content.to_excel(book, sheet_name=sheet, index=False)
    save(labs(), tmp_path / "labs.csv")
    paths = {"table": tmp_path / table, "labels": tmp_path / labels, "out": tmp_path / "o.csv"}
    if place:
        with pytest.raises(InputError, match=place):
            make_rows("from_long", **paths, **FLAGS, sheet=sheets)
    else:
        made = make_rows("from_long", **paths, **FLAGS, sheet=sheets)
        assert trajectory(made).startswith("1 (0h)")
        assert "patients.xlsx: sheet" not in caplog.text
        assert ("two.xlsx: sheet 'Jan' of 2 is read" in caplog.text) == (table == "two.xlsx")


def test_rows_without_a_label_are_kept_and_without_labels_there_is_no_column(make, caplog):
    caplog.set_level(logging.INFO)
    rows, _ = make(labs(), people(**{"AKI stage 3": ["", "Yes"]}))
    assert rows["label_escalation"].isna().tolist() == [True, False]
    assert "1 of 2 rows have no label" in caplog.text
    rows, _ = make(labs(), people().drop(columns="AKI stage 3"), columns=(), no_labels=True)
    assert "label_escalation" not in rows
    assert len(rows) == 2


def test_a_new_patient_without_values_keeps_a_row_and_has_no_risk(make, caplog, tmp_path):
    """Of three new patients one has no value, and one a value of another series alone."""
    other = labs(patients=2).assign(Analyte=["Creatinine"] * 2 + ["Potassium"] * 2)
    new = people(3).drop(columns="AKI stage 3")
    series = (*SERIES[:1], "potassium=Potassium")
    rows, about = make(other, new, columns=(), no_labels=True, series=series)
    assert rows["id"].str[:2].tolist() == ["P0", "P1", "P2"]
    assert rows.filter(like="trajectory").notna().sum(axis=1).tolist() == [1, 0, 0]
    assert about["flow"][-1]["left"] == 1
    assert "2 rows have no value of creatinine" in caplog.text
    output.write_rows(rows, about, tmp_path / "new.csv")
    assert dataset_format.main(["check", str(tmp_path / "new.csv")]) == 0


def crea(folder, name, patients, factor):
    """Write the tables of some patients; return their flags."""
    rng = np.random.default_rng(patients)
    values = labs("2", patients=patients)
    level = factor * np.repeat(np.exp(rng.normal(0, 0.2, patients)), 3)
    values["Result"] = (values["Result"].astype(float) * level).round(3)
    table = save(values.assign(Analyte="crea"), folder / f"{name}_labs.csv")
    labels = save(people(patients), folder / f"{name}_people.csv")
    return [f"--table={table}", f"--labels={labels}"]


@pytest.mark.parametrize(
    ("patients", "factor", "earlier", "warns"),
    [
        (20, 88.4, "old.csv", True),
        (20, 1, "old.csv", False),
        (19, 88.4, "old.csv", False),
        (20, 88.4, "old.json", False),  # the earlier file is not at hand
    ],
)
def test_new_values_are_compared_with_the_earlier_file(
    patients, factor, earlier, warns, crea_of_60, tmp_path, capsys
):
    words = crea(tmp_path, "new", patients, factor)
    words += [f"--like={crea_of_60 / earlier}", "--no_labels", f"--out={tmp_path / 'new.csv'}"]
    capsys.readouterr()
    assert dataset_format.main(["from_long", *words]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "is the unit right" in line]
    assert len(lines) == warns
    assert all("new.csv: crea: " in line and "divided by 88.4" in line for line in lines)
    assert len(pd.read_csv(tmp_path / "new.csv")) == patients


@pytest.fixture(scope="module")
def crea_of_60(tmp_path_factory):
    """A folder with the import of sixty patients, in old.csv."""
    folder = tmp_path_factory.mktemp("crea")
    words = ["from_long", *crea(folder, "old", 60, 1), *PREDICTED, "--columns=label=AKI stage 3"]
    assert dataset_format.main([*words, f"--out={folder / 'old.csv'}"]) == 0
    return folder


def test_new_patients_are_read_like_the_earlier_ones(tmp_path):
    """Every flag and finding that shapes a row comes from the earlier output; typed flags win."""
    rng = np.random.default_rng(0)
    sex, ward = rng.choice(["F", "M"], 40), rng.choice(["ICU", "ward", "ED"], 40)
    old = people(40, Sex=sex, Ward=ward, **{"AKI stage 3": rng.choice(["Yes", "No"], 40)})
    values = labs("<0.3", "QNS", patients=40)
    # Of the new ones each date may have the day first, no one is a man, none came from the ICU.
    start = pd.Timestamp("2024-03-04 08:00")
    new = people(2, Admitted=start, Ward="ED").drop(columns="AKI stage 3")
    new_values = labs("<0.3", "QNS").assign(Collected=lambda t: t["Collected"] - START + start)
    values, new_values = (t.rename(columns={"Result": "Ergebnis"}) for t in (values, new_values))
    tables = {"labs": values, "patients": old, "new_labs": new_values, "new_patients": new}
    path = {
        name: str(save(written(table, AMERICAN), tmp_path / f"{name}.csv"))
        for name, table in tables.items()
    }
    out = [str(tmp_path / name) for name in ("aki.csv", "new.csv", "again.csv")]
    words = ["from_long", "--table", path["labs"], "--labels", path["patients"], "--out", out[0]]
    words += [
        "--columns",
        "label=AKI stage 3",
        "value=Ergebnis",
        "--prediction_time",
        "Admitted + 48 h",
    ]
    words += ["--window_hours", "48", "--series", SERIES[0], "--static", STATIC[0]]
    words += ["--static", STATIC[1], "--static", "ward=Ward"]
    words += ["--below_limit", "half", "--bad_values", "drop", "--decimal", "point"]
    assert dataset_format.main(words) == 0
    like = ["from_long", "--table", path["new_labs"], "--labels", path["new_patients"]]
    like += ["--like", out[0], "--no_labels"]
    before = Path(out[0]).read_bytes()
    assert dataset_format.main([*like, "--out", out[0]]) == 2, "it would replace what it is like"
    assert Path(out[0]).read_bytes() == before
    assert dataset_format.main([*like, "--out", out[1]]) == 0
    first, rows = pd.read_csv(out[0]), pd.read_csv(out[1])
    kept = json.loads(Path(out[1]).with_suffix(".json").read_text())["arguments"]
    assert {k: kept[k] for k in ("decimal", "window_hours")} == {
        "decimal": "point",
        "window_hours": 48,
    }
    assert [*rows] == [*first.drop(columns="label_escalation")]
    assert rows["clinical_trajectory"][0] == "1 (0h) -> 1.5 (12h) -> 0.15 (24h)"
    assert rows["prediction_time"][0] == "2024-03-06T08:00:00"
    assert rows.filter(like="static_").iloc[0].to_dict() == {
        "static_age [years]": 50,
        "static_sex_male": 0,
        "static_ward ed": 1,
        "static_ward icu": 0,
        "static_ward ward": 0,
    }
    assert MIMICtrajectoryDataset(out[1], require_labels=False).outcome == "AKI stage 3"
    third = [*words[:5], "--out", out[2], "--like", out[1], "--columns", "label=AKI stage 3"]
    assert dataset_format.main(third) == 0, "--no_labels is of the earlier patients"
    assert MIMICtrajectoryDataset(out[2]).labels.sum() == first["label_escalation"].sum()
    renamed = written(new_values.rename(columns={"Analyte": "What"}), AMERICAN)
    typed = ["--table", str(save(renamed, tmp_path / "renamed.csv")), "--columns", "item=What"]
    typed += ["--series", "crea [mg/dL]=Creatinine", "--below_limit", "value"]
    assert dataset_format.main([*like, "--out", out[2], *typed, "--static", "ward="]) == 0
    dataset = MIMICtrajectoryDataset(out[2], require_labels=False)
    assert dataset.features == ("creatinine", "crea")
    wards = [f"static_ward {name}" for name in ("ed", "icu", "ward")]
    assert dataset.static_names == (*wards, "static_age [years]", "static_sex_male")
    assert pd.read_csv(out[2])["clinical_trajectory"][0].endswith("0.3 (24h)")


@pytest.fixture(scope="module")
def earlier_output(tmp_path_factory):
    """Two tables, and the description of their import."""
    folder = tmp_path_factory.mktemp("earlier")
    paths = {"table": save(labs(), folder / "t.csv"), "labels": save(people(), folder / "l.csv")}
    _, about = make_rows("from_long", **paths, out=folder / "old.csv", **FLAGS)
    return [f"--{name}={path}" for name, path in paths.items()], about


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("window_hours", 1e300),
        ("window_hours", None),
        ("time_unit", "years"),
        ("min_observations", 0),
        ("columns", [1]),
        ("series", [{"a": 1}]),
        ("factor", ["x"]),
        ("read_as", {"times": 5}),
        ("read_as", {"static": {"x": 5}}),
        ("memory_limit", "all"),  # of a machine, not taken
    ],
)
def test_flags_of_an_earlier_output_are_checked_like_typed_ones(
    key, value, earlier_output, tmp_path, capsys
):
    words, about = earlier_output
    altered = {**about, "arguments": {**about["arguments"], key: value}}
    (tmp_path / "old.json").write_text(json.dumps(altered))
    words = [*words, f"--like={tmp_path / 'old.csv'}", f"--out={tmp_path / 'new.csv'}"]
    assert dataset_format.main(["from_long", *words]) == (0 if key == "memory_limit" else 2)
    error = capsys.readouterr().err
    assert key == "memory_limit" or (error.count("\n") == 1 and (key in error or key == "read_as"))
