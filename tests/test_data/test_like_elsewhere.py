"""Another hospital's tables for the same model, items that are one, and flags declared once."""

import json
import shutil
import tomllib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dataset_format
from exports import answer
from medgemma_clinical.commands import config
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.data.importers.long_request import LongRequest, read_like
from medgemma_clinical.data.importers.long_values import (
    Group,
    Item,
    find_synonyms,
    propose_factor,
)
from medgemma_clinical.flags import FORM, NEVER, flags_of, stored

pytestmark = pytest.mark.slow

ADMITTED = pd.Timestamp("2024-03-02 08:00")
PATIENTS = 40
HERE = ("PID", "Zeit", "Untersuchung", "Ergebnis", "Einheit", "Aufnahme", "tot", "Alter", "Sex")
THERE = (
    "PAT_ID",
    "TAKEN",
    "COMPONENT",
    "ORD_VALUE",
    "REF_UNIT",
    "ADMITTED",
    "DIED",
    "AGE",
    "SEX_C",
)
LEVELS = {"Kreatinin": (1.1, "mg/dl"), "CRP": (20.0, "mg/l"), "Kalium": (4.2, "mmol/l")}
OTHER = {"KREA": (97.0, "µmol/L"), "C-Reactive Protein": (2.0, "mg/dL"), "Glucose": (110, "mg/dL")}


def write(folder, name, levels, columns, sexes, words, decimal, seed=1):
    """Two values of each item of each patient; return the tables' flags."""
    rng, lines = np.random.default_rng(seed), []
    for p in range(PATIENTS):
        for item, (level, unit) in levels.items():
            for hour in (2, 11):
                text = f"{level * np.exp(0.3 * rng.normal()):.3g}".replace(".", decimal)
                lines.append((f"P{p:03d}", ADMITTED + pd.Timedelta(hour, "h"), item, text, unit))
    labs = pd.DataFrame(lines, columns=columns[:5])
    people = {columns[0]: [f"P{p:03d}" for p in range(PATIENTS)], columns[5]: ADMITTED}
    people |= {columns[6]: words * 10, columns[7]: range(30, 70), columns[8]: sexes * 20}
    people |= {"Gruppe": [*"abca"] * 10} if columns[5] == "Aufnahme" else {}
    labs.to_csv(folder / f"{name}_labs.csv", index=False, sep=";")
    pd.DataFrame(people).to_csv(folder / f"{name}_people.csv", index=False, sep=";")
    return flags_of_tables(folder, name)


def flags_of_tables(folder, name):
    return [f"--table={folder / f'{name}_labs.csv'}", f"--labels={folder / f'{name}_people.csv'}"]


def title(name):
    return f"{name} [{LEVELS[name][1]}]"


def run(*words):
    return dataset_format.main(["from_long", *map(str, words)])


def read(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A folder with two hospitals' tables, and the import of the first one's in model.csv."""
    folder = tmp_path_factory.mktemp("model")
    here = write(folder, "here", LEVELS, HERE, ["m", "w"], [*"xyyy"], ",")
    write(folder, "there", OTHER, THERE, ["1", "2"], ["Y", "N", "N", "N"], ".", 2)
    words = ["--columns", *(f"{x}={y}" for x, y in zip(ROLES, HERE, strict=False))]
    words += ["--prediction_time=Aufnahme + 24 h", "--outcome_column=tot", "--positive=x"]
    words += ["--static=Alter [years]=Alter", "--static=Sex=Sex", "--static=group=Gruppe"]
    words += ["--decimal=comma", *(f"--series={title(name)}={name}" for name in LEVELS)]
    assert run(*here, *words, "--window_hours=30", f"--out={folder / 'model.csv'}") == 0
    return folder


@pytest.fixture
def model(imported, tmp_path):
    """The first hospital's import, and the flags of both hospitals' tables."""
    shutil.copytree(imported, tmp_path, dirs_exist_ok=True)
    return (
        tmp_path / "model.csv",
        flags_of_tables(tmp_path, "here"),
        flags_of_tables(tmp_path, "there"),
    )


ROLES = ("subject_id", "time", "item", "value", "unit")
GIVEN = ["--columns", *(f"{x}={y}" for x, y in zip(ROLES, THERE, strict=False)), "label=DIED"]
GIVEN += ["--prediction_time=ADMITTED + 24 h", "--static=Alter=AGE", "--static=Sex=SEX_C"]
GIVEN += ["--static=group=", "--sex", "1=male", "2=female"]
MAPPED = ["--series=CRP=C-Reactive Protein", "--series=Kalium=", "--series=Kreatinin=KREA"]
FACTORS = ["--factor=KREA:µmol/L=0.01131", "--factor=C-Reactive Protein:mg/dL=10"]


def test_another_hospital_s_table_is_that_of_the_model(model, tmp_path, capsys):
    out, _, there = model
    other = tmp_path / "other.csv"
    words = [f"--like={out}", *GIVEN, *MAPPED, *FACTORS, f"--out={other}"]
    assert run(*there, *words) == 0
    assert "there_labs.csv: items not read: Glucose (80 values)" in capsys.readouterr().out
    first, rows = read(out), read(other)
    assert set(rows.filter(like="static_group").to_numpy().ravel()) == {""}
    assert rows.filter(like="static_group").shape[1] == 3
    assert sorted(rows) == sorted(first)
    assert set(rows["trajectory_Kalium [mmol/l]"]) == {""}
    for column, factor in (
        ("clinical_trajectory", 0.01131 * 97 / 1.1),
        ("trajectory_CRP [mg/l]", 1),
    ):
        medians = [
            table[column].str.extract(r"^(\S+) ")[0].astype(float).median()
            for table in (rows, first)
        ]
        assert medians[0] == pytest.approx(factor * medians[1], rel=0.2)
    assert rows["static_sex_male"].tolist() == ["1", "0"] * 20
    assert rows["label_escalation"].tolist() == ["1", "0", "0", "0"] * 10
    kept = json.loads(other.with_suffix(".json").read_text())["arguments"]
    assert (kept["window_hours"], kept["decimal"], kept["positive"]) == (30, "", [])
    assert [x.partition("=")[0] for x in kept["series"]] == [*map(title, LEVELS)]
    assert {*kept} == {x.name for x in flags_of(LongRequest).values() if x.stored != NEVER} | {
        "read_as"
    }
    outcomes = []
    for label in ([], ["--label=death=DIED"]):
        assert run(*there, *words, *label) == 0
        outcomes.append(json.loads(other.with_suffix(".json").read_text())["outcome"])
    assert outcomes == ["tot", "death"]


@pytest.mark.parametrize(
    ("left_out", "parts"),
    [
        (MAPPED[2:], ["there_labs.csv", "--series 'Kreatinin [mg/dl]="]),
        (MAPPED[1:], ["there_labs.csv", "Kreatinin", "Kalium", "not measured here"]),
        (FACTORS[:1], ["there_labs.csv", "--factor 'KREA:"]),
        (["--static=Sex=SEX_C"], ["there_people.csv", "--static Sex=Sex"]),
        (["--sex", "1=male", "2=female"], ["there_people.csv", "SEX_C", "--sex 1="]),
        (["--prediction_time=ADMITTED + 24 h"], ["there_people.csv", "Aufnahme"]),
    ],
)
def test_what_another_hospital_names_otherwise_is_refused_by_name(left_out, parts, model, capsys):
    out, _, there = model
    words = [x for x in (*GIVEN, *MAPPED, *FACTORS) if x not in left_out]
    other = out.with_name("other.csv")
    capsys.readouterr()
    assert run(*there, f"--like={out}", *words, f"--out={other}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(part in error for part in parts), error
    assert not other.exists()


def test_what_is_mapped_keeps_unit_and_columns_of_the_model(model, capsys):
    """A static feature that is not measured has the model's columns, too, all empty."""
    out, _, there = model
    other, words = out.with_name("other.csv"), [*GIVEN[:-3], *MAPPED, *FACTORS]
    assert run(*there, f"--like={out}", *words, "--static=Sex=", f"--out={other}") == 0
    rows = read(other)
    assert {*rows} == {*read(out)}
    assert set(rows["static_sex_male"]) == {""}
    capsys.readouterr()
    words.append("--series=CRP [mg/dL]=C-Reactive Protein")
    assert run(*there, f"--like={out}", *words, f"--out={other}") == 2
    assert "--series " in capsys.readouterr().err


def test_an_outcome_of_words_hides_no_other_question(model, capsys):
    out, _, there = model
    write(out.parent, "there", OTHER, THERE, ["1", "2"], ["deceased", *["home"] * 3], ".", 2)
    assert run(*there, f"--like={out}", f"--out={out.with_name('other.csv')}", "--preview") == 0
    said = capsys.readouterr().out.partition("open questions")[2]
    assert all(part in said for part in ("DIED", "'Kreatinin [mg/dl]=KREA'", "--factor"))


def test_a_preview_asks_for_all_of_another_hospital_at_once(model, capsys):
    """Its file runs once the first answers are taken, but for the items that no name tells."""
    out, _, there = model
    path = out.with_name("other.toml")
    assert run(*there, f"--like={out}", f"--out={path.with_suffix('.csv')}", "--preview") == 0
    said = capsys.readouterr().out.partition("open questions")[2]
    for part in (
        *("'subject_id=PAT_ID'", "'time=TAKEN'", "'item=COMPONENT'", "'value=ORD_VALUE'"),
        *("'unit=REF_UNIT'", "'label=DIED'"),
        *("'ADMITTED + 24 h'", "'Alter [years]=AGE'", "'Sex=SEX_C'", "'1=male'", "'group='"),
        *("'Kreatinin [mg/dl]=KREA'", "'CRP [mg/l]=C-Reactive Protein'", "'Kalium [mmol/l]='"),
        *("'KREA:µmol/L=0.01131'", "'C-Reactive Protein:mg/dL=10'"),
    ):
        assert part in said, part
    assert "decimal" not in said
    answer(path)
    assert run("--config", path) == 0
    typed = out.with_name("typed.csv")
    words = [f"--like={out}", *GIVEN, *MAPPED, *FACTORS]
    assert run(*there, *words, f"--out={typed}") == 0
    assert read(path.with_suffix(".csv")).equals(read(typed))


def test_new_patients_of_the_same_tables_need_no_answer(model, tmp_path):
    """Without labels an item may be missing by chance; the form of the cells is the earlier one."""
    out, *_ = model
    few = {name: LEVELS[name] for name in ("Kreatinin", "CRP")}
    new = write(tmp_path, "new", few, HERE, ["m", "w"], [*"xyyy"], ",", 3)
    path = tmp_path / "new.csv"
    assert run(*new, f"--like={out}", "--no_labels", f"--out={path}") == 0
    assert [*read(path)] == [*read(out).drop(columns="label_escalation")]
    assert run(*new, f"--like={out}", f"--out={path}") == 2, "with labels it is asked"
    kept = json.loads(path.with_suffix(".json").read_text())["arguments"]
    assert (kept["decimal"], kept["positive"]) == ("comma", ["x"])


DATES = ("Died", "Moved", "Left"), ("DOD", "ICU_IN", "DISCH")


def dated(folder, name, dates, seed):
    """Give a table of patients times of death and of the ICU, of some, and of the end of all."""
    path, rng = folder / f"{name}_people.csv", np.random.default_rng(seed)
    table = pd.read_csv(path, sep=";", dtype=str).drop(columns=["tot", "DIED"], errors="ignore")
    for column, few in zip(dates, (0.3, 0.4, 1), strict=True):
        at = ADMITTED + pd.Timedelta("30h") + pd.to_timedelta(rng.integers(1, 900, PATIENTS), "h")
        table[column] = at.astype("string").where(rng.random(PATIENTS) < few, "")
    table.to_csv(path, index=False, sep=";")


@pytest.mark.parametrize(
    "flags",
    [
        ["--label=death within 30 days={0}"],
        ["--event=death={0}", "--event=ICU={1}", "--event_time={2}"],
    ],
)
def test_dates_of_another_hospital_are_typed_or_asked_for(flags, model, tmp_path, capsys):
    _, here, there = model
    for k, name in enumerate(("here", "there")):
        dated(tmp_path, name, DATES[k], k)
    earlier, path = tmp_path / "dated.csv", tmp_path / "other.toml"
    words = ["--columns", *(f"{x}={y}" for x, y in zip(ROLES, HERE, strict=False))]
    words += ["--prediction_time=Aufnahme + 24 h", "--series=CRP [mg/l]=CRP", "--decimal=comma"]
    assert run(*here, *words, *(x.format(*DATES[0]) for x in flags), f"--out={earlier}") == 0
    given = [*GIVEN[:6], "--prediction_time=ADMITTED + 24 h", MAPPED[0], FACTORS[1]]
    like = [*there, f"--like={earlier}", *given]
    typed = tmp_path / "typed.csv"
    assert run(*like, *(x.format(*DATES[1]) for x in flags), f"--out={typed}") == 0
    assert run(*like, f"--out={path.with_suffix('.csv')}") == 2
    capsys.readouterr()
    assert run(*like, f"--out={path.with_suffix('.csv')}", "--preview") == 0
    said = capsys.readouterr().out.partition("open questions")[2]
    texts = [x.format(*DATES[1]).partition("=")[2] for x in flags if "event_time" not in x]
    assert all(text in said for text in texts)
    assert "=ADMITTED" not in said
    answer(path, **{flags[0][2:].partition("=")[0]: json.dumps(texts)})
    assert run("--config", path) == 0
    assert read(path.with_suffix(".csv")).equals(read(typed))


@pytest.mark.parametrize("kept", [2, 3, 4])
def test_the_form_of_cells_is_taken_from_tables_of_the_same_columns(kept, model, tmp_path):
    """One column may have a new name."""
    out, *_ = model
    columns = [*HERE[:kept], *THERE[kept:4], *HERE[4:]]
    new = write(tmp_path, "new", LEVELS, columns, ["m", "w"], [*"xyyy"], ",", 3)
    words = ["--columns", *(f"{x}={y}" for x, y in zip(ROLES, columns, strict=False))]
    path = tmp_path / "new.csv"
    answers = [] if kept > 2 else ["--positive=x", "--decimal=comma"]
    assert run(*new, f"--like={out}", *words, *answers, f"--out={path}") == 0
    if kept > 2:
        assert json.loads(path.with_suffix(".json").read_text())["arguments"]["positive"] == ["x"]
    else:
        assert run(*new, f"--like={out}", *words, "--decimal=comma", f"--out={path}") == 2


# --------------------------------------------------------------------------- one quantity


@pytest.mark.parametrize(
    ("names", "middles", "is_asked"),
    [
        (("Creatinine", "CREATININE, SERUM"), (1.0, 1.1), True),
        (("Natrium", "Sodium"), (140, 141), True),
        (("CRP", "Prot\u00e9ine C-r\u00e9active"), (20, 45), True),  # known as one quantity
        (("Widget", "Widget two"), (1.0, 1.2), True),
        (("Widget", "Widget two"), (1.0, 2.0), False),
        (("Creatinine", "Creatinine urine"), (1.0, 1.1), False),
        (("Calcium", "Calcium ionised"), (1.2, 1.1), False),
        (("Sodium", "Potassium"), (4, 4), False),
    ],
)
def test_items_of_one_quantity_are_found(names, middles, is_asked):
    pairs = zip(names, middles, strict=True)
    items = [Item(Feature(name, "u", (name,)), 9, middle) for name, middle in pairs]
    assert find_synonyms(items) == ({items[1]: items[0]} if is_asked else {})


def test_items_of_one_quantity_are_asked_and_never_guessed(tmp_path, capsys):
    """An item whose name no column can have stays the main series."""
    levels = {"Creatinine": (1.0, "u"), "CREATININE, SERUM": (1.1, "u"), "Zinc": (9, "u")}
    words = write(tmp_path, "one", levels, THERE, ["F", "M"], ["Y", "N", "N", "N"], ".")
    words += [*GIVEN[:8], f"--out={tmp_path / 'one.csv'}", "--equal_times=keep"]
    assert run(*words) == 2
    capsys.readouterr()
    assert run(*words, "--preview") == 0
    assert "is CREATININE, SERUM the series Creatinine" in capsys.readouterr().out
    text = (tmp_path / "one.toml").read_text()
    assert tomllib.loads(text)["series"] == ["Creatinine [u]=Creatinine", "Zinc [u]=Zinc"]
    answer(tmp_path / "one.toml")
    assert run("--config", tmp_path / "one.toml") == 0
    rows = read(tmp_path / "one.csv")
    assert [*rows.filter(like="trajectory_")] == ["trajectory_Zinc [u]"]
    assert rows["clinical_trajectory"].str.count("->").eq(3).all()


@pytest.mark.parametrize(
    ("units", "middles", "factor"),
    [
        (("mg/dL", "mg/L"), (15.0, 155), 0.1),  # prefixes
        (("\N{MICRO SIGN}mol/L", "nmol/L"), (1.5, 1400), 0.001),
        (("mg/dL", "U/L"), (1.5, 2.0), 0),  # nothing says how
        (("mg/dL", "mg/L"), (1.5, 1.6), 0),  # values that do not fit it
        (("G/L", "10*3/uL"), (9, 9), 1),
        (("K/uL", "10^9/L"), (9, 9), 1),
        (("10*3/uL", "/mm3"), (9, 9000), 0.001),
        (("u", "v"), (9, 10.5), 1),
        (("u", "v"), (9, 14), 0),
        (("u", ""), (9, 12), 1),  # none is written
        (("mg/dL", ""), (20, 2000), 0),
    ],
)
def test_a_factor_is_proposed_only_where_it_is_known(units, middles, factor):
    group = Group("x", units[0], False, "x", units[1], middles[1])
    ratio = middles[0] / middles[1]
    proposed = propose_factor(group, units[0], ratio, [(middles[0], 1.0)])
    assert proposed == pytest.approx(factor)


@pytest.mark.parametrize(
    ("units", "middles", "first"),
    [(("10*3/uL", "/mm3"), (9, 9000), "=0.001'"), (("u", "v"), (9, 14), "=drop'")],
)
def test_a_factor_is_proposed_or_the_values_are_left_out(units, middles, first, tmp_path, capsys):
    """A preview takes no number that no answer gives, and shows what will be written."""
    labs = []
    for unit, middle in zip(units, middles, strict=True):
        write(tmp_path, "one", {"x": (middle, unit)}, THERE, ["F", "M"], ["Y", "N"] * 2, ".")
        labs.append(pd.read_csv(tmp_path / "one_labs.csv", sep=";", dtype=str))
    table = pd.concat([labs[0], labs[1][::2]])
    words = [f"--table={tmp_path / 'labs.csv'}", f"--labels={tmp_path / 'one_people.csv'}"]
    table.to_csv(tmp_path / "labs.csv", index=False)
    words += [*GIVEN[:8], f"--out={tmp_path / 'one.csv'}"]
    assert run(*words, "--equal_times=keep") == 2
    capsys.readouterr()
    assert run(*words, "--equal_times=keep", "--preview") == 0
    said = capsys.readouterr().out
    assert first in said.partition("--factor ")[2].splitlines()[0]
    answer(tmp_path / "one.toml")
    assert run("--config", tmp_path / "one.toml") == 0
    rows = read(tmp_path / "one.csv")
    assert f" {rows['clinical_trajectory'][0][:15]}" in said
    counts = rows["clinical_trajectory"].str.count("h\\)")
    assert counts.eq(2 if "drop" in first else 3).all()


# --------------------------------------------------------------------------- one declaration


NASTY = "id=x \"y\" \\ 'z' µ\x7f"


@pytest.mark.parametrize("name", [x.name for x in fields(LongRequest) if "flag" in x.metadata])
def test_a_flag_is_typed_and_stored_alike(name, tmp_path):
    flag = flags_of(LongRequest)[name]
    value = {bool: True, float: 7.5, int: 7}.get(type(flag.default), NASTY)
    value = flag.form[-1] if isinstance(flag.form, tuple) else value
    words = [f"--{name}"] if value is True else [f"--{name}={value}"]
    parsed, given = dataset_format.build_parser().parse_given(["from_long", *words])
    typed = vars(parsed)[name]
    assert f"--{name}" in given
    path = tmp_path / "one.toml"
    request = LongRequest(**{name: typed})
    path.write_text(config.toml_text(request, [], {}), encoding="utf-8-sig")
    assert config.read_flags(path, LongRequest)[name] == typed
    arguments = {"keep": ["x"], **stored(request), "read_as": {}}
    arguments |= {name: f"{typed}" if flag.form is Path else typed}
    path.write_text(json.dumps({"arguments": arguments, "made_by": "from_long"}))
    earlier = read_like(path.rename(tmp_path / "one.json"))
    found = {"series": earlier.series, "columns": earlier.columns, **earlier.values, **earlier.form}
    expected = {"id": NASTY[3:]} if name == "columns" else typed
    assert (found.get(name) == expected) == (flag.stored != NEVER)
    assert (name in earlier.form) == (flag.stored == FORM)
