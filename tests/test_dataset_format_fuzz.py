"""Random series, files and arguments of DKA files, the same in every run. None gives a traceback.

Hypothesis draws a generator for each example, not each choice: most of what it makes from single
choices are near copies of the one before.
"""

import csv
import gzip
import re
from collections import Counter
from functools import partial

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis.configuration import set_hypothesis_home_dir

import dataset_format
from conftest import sign_table
from dataset_format import InputError, MIMICtrajectoryDataset
from medgemma_clinical.data import dka
from medgemma_clinical.data.scoring import Findings
from trajectories import LABEL, SERIES, dataset_of, one_series, table_of

SECRET = "98765"
"""Stands in every cell that could hold it; no message may repeat what a patient's cell holds."""


def fuzz(check, examples):
    """Call a check with so many generators, the same in every run, and keep nothing on the disk."""
    options = {"derandomize": True, "database": None, "deadline": None}
    options["suppress_health_check"] = list(HealthCheck)
    any_random = given(st.randoms(use_true_random=True))
    settings(max_examples=examples, **options)(any_random(check))()


@pytest.fixture(scope="module", autouse=True)
def _no_folder_in_the_checkout(tmp_path_factory):
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))  # caches, even without database
    yield
    set_hypothesis_home_dir(None)


# --------------------------------------------------------------------------- series

SPACES = " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2009\u2028\u202f\u205f\u3000"
NEARLY = "0123456789.+-eEhH()<>_,;:'\"xnaif\x00\u0660\uff11\u2212\u2192\u200b\u180e\ufeff" + SPACES
"""What a slip of the hand, a spreadsheet or another program may put into a series."""

MANTISSAS = ["0", "7", "24", "007", "3.", "3.50", ".5", "9007199254740993", "179769313486231570000"]
EXACT = ["0.1000000000000000055511151231257827", "2.2250738585072011", "4.35", "8.41"]
EXPONENTS = ["", "", "", "e0", "E2", "e+3", "e-05", "e16", "e-310", "E-400"]
EDGES = ["3.4028234663852886e38", "3.4028235e38", "-1e39", "1e999", "1000000.0000000002", "-1e6"]
HOURS = ["0", "0.0", "-0", "1", "1.0", "1e0", "2.5", "24", "-5", "72", "1e6", "1e-7", "720"]


def piece(rng):
    """Write a value and its hour, any way that the contract allows."""
    number = rng.choice(
        [
            str(rng.randint(0, 300)),
            repr(rng.uniform(0, 10.0 ** rng.randint(-9, 38))),
            rng.choice(MANTISSAS + EXACT) + rng.choice(EXPONENTS),
        ]
    )
    hours = rng.choice([rng.choice(HOURS), repr(rng.uniform(-1e6, 1e6)), f"{rng.gauss(0, 99):.1f}"])
    unit = rng.choice(["h", "h", "h", "H", *UNITS, "Hours"])
    around = ["", " ", "", "", "", " "]
    if rng.random() < 0.5:
        around = ["" if rng.random() < 0.7 else rng.choice(SPACES) for _ in around]
    parts = [rng.choice(["", "", "-", "+"]) + number, "(", hours, unit, ")", ""]
    return "".join(a + b for a, b in zip(around, parts, strict=True))


def series_text(rng):
    """Write a series, now and then a long one, and spoil every other one."""
    pieces = [piece(rng) for _ in range(rng.randint(1, 30 if rng.random() < 0.1 else 4))]
    text = rng.choice(["->", "->", "\u2192"]).join(pieces)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        at, cut = rng.randint(0, len(text)), rng.randint(0, 2)
        new = rng.choice(["", "->", "nan", "inf", "(0h)", rng.choice(EDGES), rng.choice(NEARLY)])
        text = text[:at] + new + text[at + cut :]
    return text


def reference_number(text):
    """Read a sign, digits with a point among them, an exponent; None for all else."""
    mantissa, letter, exponent = text.replace("E", "e").partition("e")
    mantissa, exponent = (part[part[:1] in ("+", "-") :] for part in (mantissa, exponent))
    digits = mantissa.replace(".", "", 1)
    if not digits or set(digits + exponent) - set("0123456789"):
        return None
    return float(text) if exponent or not letter else None


UNITS = ("h", "hr", "hrs", "hour", "hours")


def reference(text):
    """Read (hours, value) by time, the latest 20; None where the contract refuses the text."""
    pairs = []
    for part in text.replace("\u2192", "->").split("->"):
        value, _, rest = part.partition("(")
        inner, bracket, behind = rest.partition(")")
        time, letter, more = inner.lower().partition("h")
        number, hour = reference_number(value.strip()), reference_number(time.strip())
        if not bracket or behind.strip() or (letter + more).strip() not in UNITS:
            return None
        if number is None or hour is None:
            return None
        if abs(number) > 3.4028234663852886e38 or abs(hour) > 1e6:
            return None
        pairs.append((hour, number))
    return sorted(pairs, key=lambda pair: pair[0])[-20:]


def bits(pairs):
    """Write numbers so that only the same floats, the sign of zero included, are equal."""
    return [(time.hex(), value.hex()) for time, value in pairs]


def test_the_parser_agrees_with_a_plain_one_on_random_texts(tmp_path, monkeypatch):
    seen = {}
    path = tmp_path / "data.csv"

    def agree(rng):
        monkeypatch.setattr(dka, "BLOCK_ROWS", rng.choice([7, 1000]))
        texts = [series_text(rng) for _ in range(60)]
        expected = {text: reference(text) for text in texts}
        seen.update({text: pairs is not None for text, pairs in expected.items()})
        good, bad = ([text for text in texts if seen[text] is wanted] for wanted in (True, False))
        findings = Findings("texts", strict=False)  # refuses rows, not the table
        mixed = MIMICtrajectoryDataset(table_of(texts), findings=findings)
        assert [texts[row] for row in sorted(findings.problems)] == bad
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([(SERIES, LABEL), *((text, 0) for text in good)])
        for dataset in (mixed, dataset_of(good), MIMICtrajectoryDataset(path)):
            assert len(dataset) == len(good)
            for i, text in enumerate(good):
                found = list(zip(*one_series(dataset, i), strict=True))
                assert bits(found) == bits(expected[text] or []), repr(text)
        for text in bad[::3]:
            with pytest.raises(InputError, match=f"row 0, column {SERIES}: ") as caught:
                dataset_of([text])
            assert len(text) < 5 or text not in str(caught.value)

    fuzz(agree, 6)
    assert len(seen) >= 250
    assert min(Counter(seen.values()).values()) >= 80


# --------------------------------------------------------------------------- files

UREA = "trajectory_urea\nnitrogen [mg/dL]"
"""A further series; a spreadsheet breaks long headings into lines."""

PATIENTS = [f"{SECRET} {name}" for name in ("007", "NA", "Müller, Jörg", 'so "called"', "\u4e2d")]
CONTEXTS = ["", f"54-year-old {SECRET}, man", f'"{SECRET}"\r\n{SECRET}', f" {SECRET}\t"]
CELLS = {
    SERIES: [f"{SECRET}.{abs(k)} (0h) -> -{SECRET} ({k}h)" for k in range(-9, 9)],
    UREA: ["", f"{SECRET}(0h)", f" {SECRET}\u00a0(2h) ->\n +{SECRET}e1 (-1.5h) "],
    LABEL: ["0", "1", "1", "0", "1.0", " 0 "],
    "subject_id": PATIENTS,
    "id": [*PATIENTS, "", *map(str, range(20))],
    "clinical_context": CONTEXTS,
    "split": ["train"] * 30 + ["Train", "val", " test"],
    "note": ["", f"{SECRET}, {SECRET}", "1"],
}
WRONG = ["", " ", *f"2 0.5 nan -1 \uff11 1e999 val {SECRET} \x00{SECRET}".split(" ")]
WRONG += [f"{SECRET} {end}" for end in ("yes", "(0h) -> x", "(9e9h)", "(0h) ->", "(0h) (1h)")]
WRONG += [f"{SECRET}e40 (0h)", f"{SECRET} (0h)\n-> inf (1h)"]
PLACES = ["", "", "", "\n", "\n\n", '"",\n', "  \n"]
"""Blank rows, which a spreadsheet counts and nobody reads."""


def known_rows(rng, *, wrong):
    """Make up to six rows of any columns, with a wrong cell or two where that is wanted."""
    chosen = [name for name in CELLS if name in (SERIES, LABEL) or rng.random() < 0.5]
    rng.shuffle(chosen)
    rows = [{name: rng.choice(CELLS[name]) for name in chosen} for _ in range(rng.randint(1, 6))]
    for _ in range(wrong * rng.randint(1, 2)):
        rng.choice(rows)[rng.choice(chosen)] = rng.choice(WRONG)
    return rows


def field(cell, rng):
    """Write a cell, in quotes where it needs them and sometimes where not, after a space or two."""
    quoted = rng.random() < 0.3 or re.search('[,;"\r\n]', cell)
    written = '"' + cell.replace('"', '""') + '"' if quoted else cell
    return " " * rng.choice([0, 0, 0, 1, 2]) + written


def write(rows, rng, comma=",", too_long=0.0):
    """Write rows as one of the many kinds of CSV, a share of them with a cell too much.

    Returns:
        The file, its rows by number as a spreadsheet counts, the numbers of rows with too much.
    """
    end = rng.choice(["\n", "\n", "\r\n", "\r"])
    numbered = {}
    longer, lines, number, width = set(), [], 0, 0
    for row in [{name: name for name in rows[0]}, *rows]:
        blank = rng.choice(PLACES if lines else ["", "", "\n", "  \n"])
        cells = [field(cell, rng) for cell in row.values()]
        number += 1 + blank.count("\n")
        width = width or len(cells) + rng.choice([0, 0, 0, 2])  # of the header
        cells += [""] * (width - len(cells))
        if numbered and rng.random() < too_long:
            cells += [SECRET]
            longer.add(number)
        lines.append(blank.replace("\n", end) + comma.join(cells))
        numbered[number] = row
    text = end.join(lines) + end * rng.randint(0, 2)
    del numbered[min(numbered)]
    blank_rows = {n for n, row in numbered.items() if not any(map(str.strip, row.values()))}
    kept = {n: row for n, row in numbered.items() if n not in blank_rows - longer}
    mark = rng.choice(["", "", "\ufeff"])
    return (mark + text).encode(), kept, longer


def wrong_places(rows):
    """Find each cell that the README's table of columns does not allow."""
    found, sides = set(), {}
    for number, row in rows.items():
        cells = {name: cell.strip() for name, cell in row.items()}
        series = {name: cells[name] for name in (SERIES, UREA) if name in cells}
        wrong = {name for name, text in series.items() if text and reference(text) is None}
        wrong |= set() if any(series.values()) else {SERIES}
        wrong |= set() if cells[LABEL] in ("0", "1", "1.0") else {LABEL}
        patient = next((n for n in ("subject_id", "id") if n in cells), None)
        wrong |= {patient} if patient and not cells[patient] else set()
        if "split" in cells:
            side = cells["split"].lower().replace("validation", "val")
            name = cells[patient] if patient else str(number)
            if side not in ("train", "val", "test") or sides.setdefault(name, side) != side:
                wrong.add("split")
        found |= {(number, name) for name in wrong}
    return found


def same_content(dataset, rows):
    """Compare a data set with the rows that were written."""
    known = [{name: cell.strip() for name, cell in row.items()} for row in rows.values()]
    numbered = zip(map(str, rows), known, strict=True)
    patients = [row.get("subject_id", row.get("id", number)) for number, row in numbered]
    assert dataset.labels.tolist() == [float(row[LABEL]) for row in known]
    assert dataset.groups.tolist() == patients
    assert dataset.ids.tolist() == [
        row.get("id", p) for row, p in zip(known, patients, strict=True)
    ]
    assert dataset.contexts.tolist() == [row.get("clinical_context", "") for row in known]
    if "split" in known[0]:
        assert dataset.parts.tolist() == [row["split"].lower() for row in known]
    else:
        assert dataset.parts is None
    columns = [name for name in (SERIES, UREA) if name in known[0]]
    for i, row in enumerate(known):
        found = {f: list(zip(t, v, strict=True)) for f, t, v in dataset.measured(i)}
        for f, column in enumerate(columns):
            assert bits(found.get(f, [])) == bits(reference(row[column]) if row[column] else [])


def load(path):
    """Read a file: the data set, or the one line that refuses it."""
    try:
        return MIMICtrajectoryDataset(path)
    except InputError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert message.startswith(str(path))
    assert SECRET not in message
    return message.removeprefix(str(path))


def test_a_file_loads_with_what_it_holds_or_names_the_place(tmp_path, monkeypatch):
    seen, read = Counter(), dka.read_tables

    def load_or_name(rng):
        content, rows, longer = write(known_rows(rng, wrong=rng.random() < 0.5), rng, too_long=0.01)
        note(repr(content))
        monkeypatch.setattr(dka, "read_tables", partial(read, max_rows=rng.choice([1, 3, 1000])))
        path = tmp_path / rng.choice(["data.csv", "data.csv.gz", "DATA.CSV"])
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        wrong = wrong_places(rows)
        found = load(path)
        seen[type(found).__name__] += 1
        if isinstance(found, MIMICtrajectoryDataset):
            assert not wrong | longer
            same_content(found, rows)
        elif not rows:
            assert found.startswith(": no rows below the header")
        else:
            place = re.match(r", row (\d+)(?:, column (.+?))?: ", found)
            assert place, found
            shown = {(str(n), name.replace("\n", "\\n")) for n, name in wrong}
            assert place.groups() in shown | {(str(n), None) for n in longer}, found

    fuzz(load_or_name, 60)
    assert min(seen.values()) >= 15, seen


def test_a_damaged_file_is_refused_in_one_line_or_still_has_its_content(tmp_path):
    seen = Counter()

    def refuse(rng):
        rows = known_rows(rng, wrong=False)
        comma, longer = rng.choice([(",", 0), (",", 0), (",", 1), (";", 0)])
        content = bytearray(write(rows, rng, comma, longer)[0])
        packed = rng.random() < 0.4
        if packed:
            content = bytearray(gzip.compress(content, mtime=0))
        sound = comma == "," and not longer
        for _ in range(sound * rng.randint(1, 2)):
            new = rng.choice([*b'",\r\n\0 ;(h)->09', rng.randint(0, 255)])
            content[rng.randint(len(content) // 2, len(content) - 1)] = new
        del content[
            rng.randint(0, len(content)) if sound and rng.random() < 0.5 else len(content) :
        ]
        note(repr(content))
        path = tmp_path / ("data.csv.gz" if rng.random() < 0.1 or packed else "data.csv")
        path.write_bytes(content)
        found = load(path)
        seen[type(found).__name__] += 1
        assert sound or isinstance(found, str), found

    fuzz(refuse, 100)
    assert len(seen) == 2, seen


# --------------------------------------------------------------------------- check

PATHS = ["good.csv", "several.csv", "wrong.csv", "empty.csv", "missing.csv", "folder", ".", "", " "]
PATHS += ["two\nlines.csv", "\x1b[31m", "x" * 300, "\u4e2d.csv"]
FLAGS = {
    "--series": [
        "urea",
        "anion gap",
        "Urea,anion_gap",
        "urea,urea",
        "kalium",
        ",",
        "a\nb",
        "\u2028",
    ],
    "--max_len": ["1", "3", " 4 ", "1_0", "0", "-1", "nan", "1e3", "\uff11", "9" * 400, "9" * 5000],
}
ODD_WORDS = ["--", "-", "-x", "", "--no_such_flag", "a b", "--help", "%s"]


def test_the_check_of_any_arguments_ends_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "wrong.csv").write_text(f"{SERIES},{LABEL}\n{SECRET},0\n")
    table = sign_table(60, seed=1)
    table.to_csv("good.csv", index=False)
    table.assign(trajectory_urea=["5 (1h)", ""] * 30).to_csv("several.csv", index=False)
    seen = Counter()

    def speak(rng):
        words = ["check", rng.choice(PATHS) if rng.random() < 0.5 else rng.choice(PATHS[:2])]
        for flag in rng.choices(list(FLAGS), k=rng.choice([0, 0, 1, 1, 2])):
            words += [flag, rng.choice(FLAGS[flag] if rng.random() < 0.9 else PATHS)]
        if rng.random() < 0.1:
            words[rng.randrange(len(words))] = rng.choice(ODD_WORDS)
        note(repr(words))
        try:
            end = str(dataset_format.main(words))
        except SystemExit as stop:
            end = f"parser {stop.code}"
        output = capsys.readouterr()
        assert end in ("0", "2", "parser 0", "parser 2")
        assert SECRET not in output.out + output.err
        if end == "2":
            assert re.fullmatch(r"error: .+\n", output.err)
        seen[end] += 1

    fuzz(speak, 60)
    assert min(seen[end] for end in ("0", "2", "parser 2")) >= 3, seen
