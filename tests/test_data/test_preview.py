"""from_long --preview: one screen with all open questions, and a TOML, which --config runs."""

import re
import tomllib

import pandas as pd
import pytest

import dataset_format
from exports import answer, values_of, write_a, write_b
from medgemma_clinical.data.importers import long_values, output, preview, sources, tables

pytestmark = pytest.mark.slow

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


@pytest.fixture
def hospital_a(tmp_path):
    truth = write_a(tmp_path)
    files = [f"--table={tmp_path / 'labor.csv'}", f"--labels={tmp_path / 'patienten.csv'}"]
    return tmp_path, files, truth


@pytest.fixture
def hospital_b(tmp_path):
    pytest.importorskip("openpyxl")
    truth = write_b(tmp_path)
    files = [f"--table={tmp_path / 'lab.csv.gz'}", f"--labels={tmp_path / 'cohort.xlsx'}"]
    return tmp_path, [*files, f"--notes={tmp_path / 'notes.csv'}"], truth


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
        "Kreatinin          µmol/L, ",
        "of 92 rows (",
        "are lost, with no value of ",
        "--window_hours 24",
        "'subject_id=Pat.-Nr.' (or subject_id=Fallnummer)",
        "'Aufnahme + 24 h' (or Entlassung + 24 h)",
        'dropped 9 values "hämolytisch"',
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
        "54 of 80 prediction times have notes",
    ):
        assert part in shown


def test_a_run_refuses_what_the_preview_asks_and_names_it(hospital_a, capsys):
    folder, files, _ = hospital_a
    assert from_long(*files, f"--out={folder / 'aki.csv'}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--preview" in error


# --------------------------------------------------------------------------- the file


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_file_of_a_preview_runs_to_the_bytes_of_the_typed_flags(by_hand, hospital_a):
    """Two calls in place of nine: all values are those of an independent computation."""
    folder, files, truth = hospital_a
    typed, out = folder / "typed.csv", folder / "aki.csv"
    series = ["Kreatinin [µmol/L]=Kreatinin [µmol/L]", "Kalium [mmol/L]=Kalium [mmol/L]"]
    flags = FLAGS_A | ({"series": series} if by_hand else {})
    assert from_long(*files, *words_of(flags), f"--out={typed}") == 0
    assert from_long(*files, f"--out={out}", "--preview") == 0
    changed = {k: FLAGS_A[k] for k in ("static", "keep")}
    changed |= {"prediction_time": '"Aufnahme + 48 h"', "window_hours": "48", "end_time": '""'}
    answer(folder / "aki.toml", **changed, **({"series": series} if by_hand else {}))
    assert from_long("--config", folder / "aki.toml", "--columns", "id=Fallnummer") == 0
    rows = pd.read_csv(out, dtype=str)
    main = "Kreatinin [µmol/L]" if by_hand else "CRP [mg/L]"
    kept = {pair: x for pair, x in truth.items() if (pair[0], main) in truth}
    kept = {pair: x for pair, x in kept.items() if not by_hand or pair[1] != "CRP [mg/L]"}
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


def test_an_earlier_file_is_moved_aside_unless_it_is_the_same(hospital_a, capsys):
    folder, files, _ = hospital_a
    path, aside = folder / "aki.toml", folder / "aki.1.toml"
    path.write_text("# mine\n")
    words = (*files, f"--out={folder / 'aki.csv'}")
    assert str(aside) in screen(capsys, *words)
    assert aside.read_text() == "# mine\n"
    screen(capsys, *words)
    assert len([*folder.glob("*.toml")]) == 2


def test_without_an_output_the_file_stands_where_the_command_runs(
    hospital_a, capsys, monkeypatch, tmp_path_factory
):
    _, files, _ = hospital_a
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    screen(capsys, *files)
    assert [path.name for path in here.iterdir()] == ["import.toml"]
    assert from_long("--config=import.toml") == 2
    assert "--out" in capsys.readouterr().err


def test_a_line_that_no_flag_helps_ends_a_preview_with_what_is_known(hospital_a, capsys):
    folder, files, _ = hospital_a
    table = pd.read_csv(folder / "labor.csv", sep=";", dtype=str, encoding="cp1252")
    table["Pat.-Nr."], table["Fallnummer"] = "x" + table["Fallnummer"], "9"
    table.to_csv(folder / "labor.csv", sep=";", index=False)
    files = [*files, "--columns=subject_id=Pat.-Nr."]
    assert from_long(*files, f"--out={folder / 'aki.csv'}", "--preview") == 2
    said = capsys.readouterr()
    assert "time               Entnahme" in said.out
    assert said.err.count("\n") == 1
    assert "aki.toml" in said.err
    assert '"time=Entnahme",  # guessed' in (folder / "aki.toml").read_text()


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
        ("zzz = 1", "unknown key zzz: the keys are out, "),
        ("preview = true", "unknown key preview"),
        ("config = 'x.toml'", "unknown key config"),
        ("[columns]\ntime = 'x'", "columns must be a list"),
        ("keep = [1]", "keep must be a list"),
        ("window_hours = '48'", "window_hours must be a number"),
        ("window_hours = true", "window_hours must be a number"),
        ("window_hours = -1", "window_hours: "),
        ("min_observations = 1.5", "min_observations: "),
        ("no_labels = 1", "no_labels must be true or false"),
        ("table = ['a.csv']", "table must be a text"),
        ("decimal = 'semicolon'", "decimal must be one of "),
        ("table = ", "not in TOML's form"),
        ("table = 'a'\ntable = 'b'", "not in TOML's form"),
        (b"table = '\xe4'", "not a text file in UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_wrong_config_is_refused_by_key(text, named, tmp_path, capsys):
    path = tmp_path / "my.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert from_long("--config", path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--config {path}: " in error
    assert named in error


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


@pytest.mark.parametrize(
    ("units", "levels", "number"),
    [
        (("mg/dL", "mg/L"), (1.5, 15.5), "10"),  # prefixes
        (("\N{MICRO SIGN}mol/L", "nmol/L"), (1.5, 1400), "1000"),
        (("mg/dL", "U/L"), (1.5, 2.0), "drop"),  # nothing says how
        (("mg/dL", "mg/L"), (1.5, 1.6), "drop"),  # values that do not fit it
        (("ug/L", "\N{GREEK SMALL LETTER MU}g/L"), (1.5, 1.6), None),  # one unit
        (("umol/l", "\N{MICRO SIGN}mol/L"), (1.5, 1.6), None),
    ],
)
def test_a_factor_is_proposed_only_where_it_is_known(units, levels, number, tmp_path, capsys):
    cells = {"Unit": [*units, "U/L", "U/L"] * 2, "Level": [*levels, 4.5, 5.5] * 2}
    words = small(tmp_path, table=cells)
    text = screen(capsys, *words)
    assert ("factor" in asked(text)) == (number is not None)
    assert "2 rows of 2 patients, 1 events" in text
    if number:
        assert f"={number}" in (tmp_path / "out.toml").read_text().partition("factor = [")[2]


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
    pytest.importorskip("openpyxl")
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


def test_a_file_with_open_questions_says_what_to_do(tmp_path, capsys):
    words = small(tmp_path)
    screen(capsys, *words)
    assert from_long("--config", tmp_path / "out.toml") == 2
    assert f"remove the # of the answers in {tmp_path / 'out.toml'}" in capsys.readouterr().err


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
        (["Krea [µmol/L]", "K [mmol/L]"], None, {"Krea": "µmol/L", "K": "mmol/L"}),
        (["Krea [µmol/L]", "K"], ["", "mmol/l"], {"Krea": "µmol/L", "K": "mmol/l"}),
        (["Krea [µmol/L]", "K"], ["mg/dl", "mmol/l"], {"Krea": "mg/dl", "K": "mmol/l"}),
        (["Krea [µmol/L]", "Krea [mg/dl]"], None, None),
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
    about = dataset_format.read_description(tmp_path / "out.csv")
    read = {about.series: about.unit}
    for name in pd.read_csv(tmp_path / "out.csv").filter(like="trajectory_"):
        title = re.fullmatch(r"trajectory_(.*) \[(.*)\]", name)
        read[title[1]] = title[2]
    assert read == titles


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
    places = (output, long_values, tables, sources.Source)
    assert all(any(hasattr(x, name) for x in places) for name in dataset_format.DESCRIBED)
    assert preview.ROWS == 3


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
@pytest.mark.parametrize("name", ["labs", "people"])
@pytest.mark.parametrize("form", ["%Y-%m-%d %H:%M", "%d.%m.%y", "%d-%b-%Y %H:%M", "%Y%m%d"])
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
