"""from_long --preview: one screen with all open questions, and a TOML, which --config runs."""

import re
import shutil
import tomllib

import pandas as pd
import pytest

import dataset_format
from exports import answer, values_of, write_a, write_b
from medgemma_clinical.data.importers import long_values, sources, tables

pytestmark = pytest.mark.slow
pytest.importorskip("openpyxl")

ROLES_A = ["subject_id=Pat.-Nr.", "time=Entnahme", "value=Ergebnis", "storetime=Befund"]
FLAGS_A = {
    "columns": [*ROLES_A, "label=AKI Stadium 3"],
    "prediction_time": "Aufnahme + 48 h",
    "window_hours": "48",
    "static": ["age [years]=Alter", "sex=Geschlecht"],
    "keep": ["Klinik"],
    "below_limit": "half",
    "bad_values": "drop",
}
ROLES_B = ["time=Sample taken (local)", "item=Untersuchung", "value=Messwert", "unit=Einheit"]
FLAGS_B = {
    "columns": [*ROLES_B, "notes.time=Written (local)", "notes.text=Free text note"],
    "prediction_time": "Admission date/time + 24 h",
    "outcome_column": ["ICU transfer <7d", "Died <30d"],
    "factor": ["CREA S/P:umol/l=0.0113"],
    "sheet": ["Patients"],
    "keep": ["Klinik"],
}


def words_of(flags):
    return [
        f"--{name}={x}"
        for name, value in flags.items()
        for x in (value if isinstance(value, list) else [value])
    ]


def from_long(*words):
    return dataset_format.main(["from_long", *map(str, words)])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The exports of both hospitals, and the values that they stand for."""
    folder = tmp_path_factory.mktemp("exports")
    return folder, write_a(folder, 40), write_b(folder, 24)


@pytest.fixture
def hospital_a(written, tmp_path):
    shutil.copytree(written[0], tmp_path, dirs_exist_ok=True)
    files = [f"--table={tmp_path / 'labor.csv'}", f"--labels={tmp_path / 'patienten.csv'}"]
    return tmp_path, files, written[1]


@pytest.fixture
def hospital_b(written, tmp_path):
    shutil.copytree(written[0], tmp_path, dirs_exist_ok=True)
    files = [f"--table={tmp_path / 'lab.csv.gz'}", f"--labels={tmp_path / 'cohort.xlsx'}"]
    return tmp_path, [*files, f"--notes={tmp_path / 'notes.csv'}"], written[2]


def screen(capsys, *words):
    capsys.readouterr()
    assert from_long(*words, "--preview") == 0
    return capsys.readouterr().out


def asked(text):
    """The flags of the open questions of a screen."""
    return re.findall(r"^  --(\w+)[ :]", text.partition("open questions")[2], re.MULTILINE)


# --------------------------------------------------------------------------- the screen


def test_a_german_export_is_shown_on_one_screen_with_all_open_questions(hospital_a, capsys):
    folder, files, _ = hospital_a
    before = {*folder.iterdir()}
    shown = screen(capsys, *files, f"--out={folder / 'aki.csv'}")
    assert {*folder.iterdir()} - before == {folder / "aki.toml"}
    assert len(shown.splitlines()) <= 44
    assert asked(shown) == ["columns", "prediction_time", "end_time", "below_limit", "bad_values"]
    for part in (
        "labor.csv: cp1252, separated by semicolons",
        "time               Entnahme, as %d.%m.%Y %H:%M, guessed",
        "storetime          Befund, as %d.%m.%Y %H:%M, guessed",
        "value              Ergebnis, decimal comma, guessed",
        "item               Parameter\n",
        "label              AKI Stadium 3, guessed",
        "Kreatinin          \u00b5mol/L, ",
        "'subject_id=Pat.-Nr.' (or subject_id=Fallnummer)",
        "'Aufnahme + 24 h' (or Entlassung + 24 h)",
        " other texts",
    ):
        assert part in shown
    assert len(re.findall(r"^  prediction_time +(2019-\S+ *){3}$", shown, re.MULTILINE)) == 1


def test_an_export_with_zones_a_second_sheet_and_notes_is_shown(hospital_b, capsys):
    folder, files, _ = hospital_b
    shown = screen(capsys, *files, f"--out={folder / 'b.csv'}")
    assert asked(shown) == ["prediction_time", "outcome_column", "factor"]
    for part in (
        "Excel, sheet Patients (others: Info)",
        "unit               Einheit, guessed",
        "notes.text         Free text note, guessed",
        "(or Died <30d)",
        "'CREA S/P:umol/l=0.01131'",
        " of 24 prediction times have notes",
    ):
        assert part in shown


# --------------------------------------------------------------------------- the file


def test_the_file_of_a_preview_runs_to_the_bytes_of_the_typed_flags(hospital_a):
    """Two calls in place of nine: all values are those of an independent computation."""
    folder, files, truth = hospital_a
    typed, out = folder / "typed.csv", folder / "aki.csv"
    assert from_long(*files, *words_of(FLAGS_A), f"--out={typed}") == 0
    assert from_long(*files, f"--out={out}", "--preview") == 0
    changed = {k: FLAGS_A[k] for k in ("static", "keep")}
    changed |= {"prediction_time": '"Aufnahme + 48 h"', "window_hours": "48", "end_time": '""'}
    answer(folder / "aki.toml", **changed)
    assert from_long("--config", folder / "aki.toml", "--columns", "id=Fallnummer") == 0
    rows = pd.read_csv(out, dtype=str)
    main = "CRP [mg/L]"
    kept = {pair: x for pair, x in truth.items() if (pair[0], main) in truth}
    read = values_of(rows, main, "id")
    assert {pair: sorted(x) for pair, x in read.items()} == kept
    assert from_long("--config", folder / "aki.toml") == 0
    assert out.read_bytes() == typed.read_bytes()


def test_an_export_of_another_kind_runs_to_the_bytes_of_the_typed_flags(hospital_b):
    folder, files, truth = hospital_b
    typed, out = folder / "typed.csv", folder / "b.csv"
    assert from_long(*files, *words_of(FLAGS_B), f"--out={typed}") == 0
    assert from_long(*files, f"--out={out}", "--preview") == 0
    changed = {k: FLAGS_B[k] for k in ("keep", "outcome_column", "factor")}
    answer(folder / "b.toml", **changed)
    assert from_long("--config", folder / "b.toml") == 0
    assert out.read_bytes() == typed.read_bytes()
    main = "CREA S/P"
    read = values_of(pd.read_csv(out, dtype=str).rename(columns=lambda x: x.split(" [")[0]), main)
    kept = {pair: x for pair, x in truth.items() if (pair[0], main) in truth}
    assert read.keys() == kept.keys()
    for pair, values in kept.items():
        assert read[pair] == [(hour, pytest.approx(value, rel=1e-6)) for hour, value in values]


def test_no_cell_of_a_patient_reaches_the_file(hospital_a, capsys):
    folder, files, _ = hospital_a
    patients = pd.read_csv(folder / "patienten.csv", sep=";", dtype=str, encoding="cp1252")
    patients["AKI Stadium 3"] = patients["AKI Stadium 3"].map({"ja": "GEHEIM", "nein": "-x-"})
    patients.to_csv(folder / "patienten.csv", sep=";", index=False, encoding="cp1252")
    shown = screen(capsys, *files, f"--out={folder / 'aki.csv'}", "--columns=label=AKI Stadium 3")
    assert "GEHEIM" in shown.partition("open questions")[2]
    text = (folder / "aki.toml").read_text()
    assert '# "VALUE",' in text
    assert not re.search(r"GEHEIM|-x-|hämolytisch|2019|1000\d\d", text)


def test_an_earlier_file_is_moved_aside_unless_it_is_the_same(tmp_path, capsys):
    """The file that is left holds open questions: a run of it, and of the flags, is refused."""
    words, path, aside = small(tmp_path), tmp_path / "out.toml", tmp_path / "out.1.toml"
    path.write_text("# mine\n")
    assert str(aside) in screen(capsys, *words)
    assert aside.read_text() == "# mine\n"
    screen(capsys, *words)
    assert len([*tmp_path.glob("*.toml")]) == 2
    assert from_long("--config", path) == 2
    assert f"remove the # of the answers in {path}" in capsys.readouterr().err
    assert from_long(*words) == 2
    assert "--preview" in capsys.readouterr().err


def test_without_an_output_the_file_stands_where_the_command_runs(tmp_path, capsys, monkeypatch):
    *files, _ = small(tmp_path)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    screen(capsys, *files)
    assert [path.name for path in here.iterdir()] == ["import.toml"]
    assert from_long("--config=import.toml") == 2
    assert "--out" in capsys.readouterr().err


def test_a_line_that_no_flag_helps_ends_a_preview_with_what_is_known(tmp_path, capsys):
    words = small(tmp_path, table={"MRN": [*"CCCCDDDD"]})
    assert from_long(*words, "--preview") == 2
    said = capsys.readouterr()
    assert "time               Taken" in said.out
    assert said.err.count("\n") == 1
    assert "out.toml" in said.err
    assert '"time=Taken",  # guessed' in (tmp_path / "out.toml").read_text()


def test_new_patients_are_previewed_like_the_earlier_ones(hospital_a, capsys):
    folder, files, _ = hospital_a
    old, new = folder / "old.csv", folder / "new.csv"
    assert from_long(*files, *words_of(FLAGS_A), f"--out={old}") == 0
    shown = screen(capsys, *files, f"--out={new}", f"--like={old}", "--no_labels")
    assert asked(shown) == []
    assert from_long("--config", folder / "new.toml") == 0
    rows, first = (pd.read_csv(path, dtype=str) for path in (new, old))
    rows = rows.dropna(subset="clinical_trajectory").drop(columns=["Klinik"])
    first = first.drop(columns=["label_escalation", "Klinik"])
    pd.testing.assert_frame_equal(rows.reset_index(drop=True), first)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('time_fromat = ["%Y"]', "unknown key time_fromat: did you mean time_format?"),
        ("preview = true", "unknown key preview"),
        ("[columns]\ntime = 'x'", "columns must be"),
        ("keep = [1]", "keep must be"),
        ("window_hours = '48'", "window_hours must be"),
        ("window_hours = true", "window_hours must be"),
        ("window_hours = -1", "window_hours: "),
        ("min_observations = 1.5", "min_observations: "),
        ("no_labels = 1", "no_labels must be"),
        ("table = ['a.csv']", "table must be"),
        ("decimal = 'semicolon'", "decimal must be"),
        ("table = 'a'\ntable = 'b'", ""),
        (b"table = '\xe4'", ""),
        (None, ""),
    ],
)
def test_a_wrong_config_is_refused_by_key(text, named, tmp_path, capsys):
    path = tmp_path / "my.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert from_long("--config", path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--config {path}: {named}" in error


def test_typed_flags_win_over_the_file_and_the_file_over_an_earlier_output(hospital_a):
    folder, files, _ = hospital_a
    old, path = folder / "old.csv", folder / "my.toml"
    assert from_long(*files, *words_of(FLAGS_A), f"--out={old}") == 0
    path.write_text(f"like = '{old}'\nwindow_hours = 24\nkeep = ['Alter', 'Klinik']\n")
    typed = {"keep": ("Alter",), "columns": ("id=Fallnummer",)}
    request = dataset_format.complete(typed, path)
    assert (request.window_hours, request.keep) == (24.0, ("Alter",))
    assert request.columns == ("id=Fallnummer",)
    assert {f"{k}={v}" for k, v in request.earlier.columns.items()} >= {*FLAGS_A["columns"]}
    assert request.below_limit == "half"
    assert dataset_format.complete({**typed, "window_hours": 3.0}, path).window_hours == 3.0


# --------------------------------------------------------------------------- guesses and words


def small(folder, table=None, people=None):
    """Two patients with two items at two times; keywords of columns replace them."""
    hours = pd.to_datetime(["2024-03-02 08:00", "2024-03-02 20:00"] * 4)
    labs = pd.DataFrame({"MRN": [*"AAAABBBB"], "Taken": hours, "What": [*"xxyy"] * 2})
    labs = labs.assign(**{"Level": [1.5, 2.5, 3.5, 4.5] * 2, **(table or {})})
    patients = pd.DataFrame({"MRN": ["A", "B"], "Admitted": hours[0], "Died": ["yes", "no"]})
    for name, content in (("labs", labs), ("people", patients.assign(**(people or {})))):
        content.to_csv(folder / f"{name}.csv", index=False)
    words = [f"--table={folder / 'labs.csv'}", f"--labels={folder / 'people.csv'}"]
    return [*words, f"--out={folder / 'out.csv'}"]


@pytest.mark.parametrize(
    ("change", "flag", "shown"),
    [
        (
            {
                "table": {"Taken": ["4/3/2024 8:30 AM", "4/3/2024 9:30 AM"] * 4},
                "people": {"Admitted": "2024-03-04"},
            },
            "time_format",
            "'%d/%m/%Y %I:%M %p' (or %m/%d/%Y %I:%M %p)",
        ),
        ({"table": {"What": ["a, b", "a=1", "c", "c"] * 2}}, "series", "'a b=a, b':"),
        ({"people": {"Died": ["dead", "alive"]}}, "no_labels", "--positive"),
        ({"people": {"Discharged": ["2024-03-09"] * 2}}, "end_time", "'Discharged': "),
        ({"table": {"Result (a)": 1, "Result (b)": 2}}, "columns", "'value=Result (a)' (or "),
    ],
)
def test_what_is_unclear_is_asked_with_its_flag_and_answers(change, flag, shown, tmp_path, capsys):
    text = screen(capsys, *small(tmp_path, **change))
    assert {*asked(text)} == {flag, "prediction_time"}
    assert any(f"--{flag}" in line and shown in line for line in text.splitlines())
    assert tomllib.loads((tmp_path / "out.toml").read_text())


def test_more_items_than_series_are_asked_for_in_one_line(tmp_path, capsys):
    words = small(tmp_path)
    table = pd.read_csv(tmp_path / "labs.csv")
    many = [table.assign(What=table["What"] + str(k)) for k in range(60)]
    pd.concat(many).to_csv(tmp_path / "labs.csv", index=False)
    text = screen(capsys, *words)
    assert asked(text) == ["prediction_time", "series"]
    assert "and 97 more: " in text
    assert len(text.splitlines()) <= 44
    assert (tmp_path / "out.toml").read_text().count('    # "') == 100


def test_a_patient_without_a_label_and_new_ones_without_notes_are_told(tmp_path, capsys):
    notes = pd.DataFrame({"MRN": ["A", "A", "B"], "Written": "2024-03-02 09:00"})
    notes["Stored"] = ["2024-03-02 10:00", "2024-03-03 10:00", ""]
    notes.assign(Text=["was well", "died", "nothing"]).to_csv(tmp_path / "notes.csv", index=False)
    words = small(tmp_path, people={"Died": ["yes", ""]})
    text = screen(capsys, *words, f"--notes={tmp_path / 'notes.csv'}", "--columns=label=Died")
    assert "notes.storetime    Stored, guessed" in text
    assert "1 of 2 rows have no label" in text
    flags = ["--prediction_time=Admitted + 24 h", f"--notes={tmp_path / 'notes.csv'}"]
    assert from_long(*words[:2], "--config", tmp_path / "out.toml", *flags) == 0
    contexts = pd.read_csv(tmp_path / "out.csv")["clinical_context"].fillna("").tolist()
    assert contexts == ["Note (2h): was well", ""]
    capsys.readouterr()
    like = ["--like", tmp_path / "out.csv", "--no_labels", f"--out={tmp_path / 'new.csv'}"]
    assert from_long(*words[:2], *like) == 0
    assert f"warning: --like {tmp_path / 'out.csv'} was made with notes" in capsys.readouterr().out


def test_two_tables_of_one_workbook_are_two_sheets(tmp_path, capsys):
    small(tmp_path)
    book = tmp_path / "all.xlsx"
    with pd.ExcelWriter(book) as writer:
        pd.DataFrame({"Export of": ["2024"]}).to_excel(writer, sheet_name="About", index=False)
        for name in ("people", "labs"):
            table = pd.read_csv(tmp_path / f"{name}.csv")
            table.to_excel(writer, sheet_name=name, index=False)
    words = [f"--table={book}", f"--labels={book}", f"--out={tmp_path / 'out.csv'}"]
    text = screen(capsys, *words)
    assert "2 rows of 2 patients" in text
    assert tomllib.loads((tmp_path / "out.toml").read_text())["sheet"] == ["labs", "people"]


def test_the_names_of_patients_are_no_items(tmp_path, capsys):
    words = small(tmp_path, table={"Name": ["Ada Z."] * 4 + ["Bo Y."] * 4})
    assert "item               What, guessed" in screen(capsys, *words)
    assert "Ada" not in (tmp_path / "out.toml").read_text()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["--prediction_time=Admission + 12 h", "--columns=label=Died"],
            ["people.csv: --columns prediction_time=?", "there is no Admission: did you mean Admi"],
        ),
        (["--columns", "time=Takn", "label=Died"], ["there is no Takn: did you mean Taken?"]),
        (["--columns", "id=Admit", "label=Died"], ["there is no Admit: did you mean Admitted?"]),
        (["--columns", "value=zz", "label=Died"], ["there is no zz: the columns are MRN, Taken"]),
    ],
)
def test_a_column_that_is_not_there_is_named_with_the_nearest(words, parts, tmp_path, capsys):
    """What is near is taken by the preview, whatever it holds."""
    files = small(tmp_path)
    assert from_long(*files, *words) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts)
    text = screen(capsys, *files, *words)
    assert "there is no" in text.partition("open questions")[2]
    assert ("--columns 'id=Admitted': " in text) == ("id=Admit" in words)


@pytest.mark.parametrize(
    ("items", "unit", "titles"),
    [
        (["Krea [\u00b5mol/L]", "K"], ["", "mmol/l"], {"Krea": "\u00b5mol/L", "K": "mmol/l"}),
        (["Krea [\u00b5mol/L]", "K"], ["mg/dl", "mmol/l"], {"Krea": "mg/dl", "K": "mmol/l"}),
        (["Krea [\u00b5mol/L]", "Krea [mg/dl]"], None, None),
    ],
)
def test_an_item_with_its_unit_in_brackets_has_that_unit_unless_a_column_has(
    items, unit, titles, tmp_path, capsys
):
    table = {"What": [items[0], items[0], items[1], items[1]] * 2}
    table |= {"Unit": [unit[0], unit[0], unit[1], unit[1]] * 2} if unit else {}
    words = [*small(tmp_path, table=table), "--columns", "time=Taken", "item=What"]
    words += ["value=Level", "label=Died", "--prediction_time=Admitted + 24 h"]
    if titles is None:
        assert from_long(*words) == 2
        assert "--series 'Krea mg/dl [unit]=Krea [mg/dl]'" in capsys.readouterr().err
        return
    assert from_long(*words) == 0
    dataset = dataset_format.MIMICtrajectoryDataset(tmp_path / "out.csv")
    assert dict(zip(dataset.features, dataset.units, strict=True)) == titles


@pytest.mark.parametrize(
    ("text", "damaged"),
    [
        ("Süd\nMünchen\nÄrzte,Kör\n", ()),
        ("Süd\nMünchen\nÄrzte,Kör\n", (11,)),
        ("x,y\n1,2\n", ()),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_a_damaged_character_of_utf8_is_no_sign_of_another_encoding(
    text, damaged, encoding, tmp_path, monkeypatch
):
    monkeypatch.setattr(tables, "BLOCK", 4)
    content = bytearray(text.encode(encoding))
    for place in damaged:
        content[place] = 0xFF
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    if damaged and encoding == "utf-8":
        with pytest.raises(ValueError, match=r"a.csv, line 2: .*--encoding cp1252"):
            tables.find_encoding(path, "")
        assert tables.find_encoding(path, "cp1252") == "cp1252"
    else:
        ascii_alone = text.isascii() and not damaged
        assert tables.find_encoding(path, "") == ("utf-8" if ascii_alone else encoding)


def test_a_damaged_table_is_refused_by_line_and_read_if_its_encoding_is_named(tmp_path, capsys):
    items = ["Süd", "Mün", "Kör", "Kör"] * 2
    words = [*small(tmp_path, table={"What": items}), "--columns", "time=Taken", "item=What"]
    words += ["value=Level", "label=Died", "--prediction_time=Admitted + 24 h"]
    content = (tmp_path / "labs.csv").read_bytes()
    (tmp_path / "labs.csv").write_bytes(content.replace("ö".encode(), b"\xff", 1))
    assert from_long(*words) == 2
    assert "labs.csv, line 4: " in capsys.readouterr().err
    assert "encoding" in asked(screen(capsys, *words))
    assert from_long(*words, "--encoding=cp1252") == 0


def test_a_preview_says_again_what_only_its_own_form_leaves_out():
    """The functions whose lines a preview leaves out exist under these names."""
    places = (long_values, tables, sources.Source)
    assert all(any(hasattr(x, name) for x in places) for name in dataset_format.DESCRIBED)


def test_the_patient_is_asked_for_even_where_one_column_may_be(tmp_path, capsys):
    words = small(tmp_path)
    for name in ("labs", "people"):
        table = pd.read_csv(tmp_path / f"{name}.csv").rename(columns={"MRN": "Case"})
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    assert "--columns 'subject_id=Case': " in screen(capsys, *words)
    assert '    # "subject_id=Case",' in (tmp_path / "out.toml").read_text()


def test_a_column_of_results_is_found_where_no_other_is_missing(tmp_path, capsys):
    stored = pd.to_datetime(["2024-03-02 09:00", "2024-03-02 21:00"] * 4)
    words = [*small(tmp_path, table={"Back": stored}), "--columns", "time=Taken", "item=What"]
    words += ["value=Level", "label=Died", "--prediction_time=Admitted + 24 h"]
    assert "'storetime=Back': " in screen(capsys, *words), "its name tells nothing"
    small(tmp_path, table={"Resulted at": stored})
    assert "storetime          Resulted at, guessed" in screen(capsys, *words)


DAYS = ["2.3.2024", "3.3.2024"] * 4


@pytest.mark.parametrize(
    ("change", "static", "key"),
    [
        ({"people": {"Admitted": "03/02/2024"}, "table": {"Taken": DAYS}}, [], "time_format"),
        (
            {"people": {"BMI": ["24.125", "31.5"]}, "table": {"Level": "1,5"}},
            ["bmi=BMI"],
            "decimal",
        ),
    ],
)
def test_what_two_tables_write_in_two_ways_stays_as_it_is_found(change, static, key, tmp_path):
    words = small(tmp_path, **change)
    for name in ("labs", "people"):
        pd.read_csv(tmp_path / f"{name}.csv", dtype=str).to_csv(
            tmp_path / f"{name}.csv", index=False, sep=";"
        )
    flags = ["--columns", "time=Taken", "item=What", "value=Level", "label=Died"]
    flags += ["--prediction_time=Admitted + 24 h", *(f"--static={x}" for x in static)]
    if key == "time_format":
        people = pd.read_csv(tmp_path / "people.csv", sep=";")
        people.loc[1, "Admitted"] = "02/29/2024"
        people.to_csv(tmp_path / "people.csv", sep=";", index=False)
    assert from_long(*words, *flags) == 0
    typed = (tmp_path / "out.csv").read_bytes()
    assert from_long(*words, *flags, "--preview") == 0
    assert key not in tomllib.loads((tmp_path / "out.toml").read_text())
    assert from_long("--config", tmp_path / "out.toml") == 0
    assert (tmp_path / "out.csv").read_bytes() == typed


@pytest.mark.parametrize("preview", [[], ["--preview"]])
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("labs", "%Y-%m-%d %H:%M"),
        ("people", "%d.%m.%y"),
        ("labs", "%d-%b-%Y"),
        ("people", "%Y%m%d"),
    ],
)
def test_no_cell_of_a_table_without_header_is_shown(form, name, preview, tmp_path, capsys):
    time = pd.Timestamp("2024-03-02 08:00").strftime(form)
    words = small(tmp_path, {"Taken": time, "MRN": "ZYX71"}, {"Admitted": time, "MRN": "ZYX71"})
    path = tmp_path / f"{name}.csv"
    path.write_text(path.read_text().partition("\n")[2])
    assert from_long(*words, *preview) == 2
    said = capsys.readouterr()
    assert str(path) in said.err
    assert said.err.count("\n") == 1
    held = [file.read_text() for file in tmp_path.glob("*.toml")]
    assert not [x for x in ("ZYX71", time) if x in "".join([said.out, said.err, *held])]
