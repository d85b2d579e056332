"""Random series and files of the DKA format, read as another, slow reading reads them."""

import csv
import gzip
import re
from collections import Counter
from functools import partial
from random import Random

import numpy as np
import pandas as pd
import pytest

from dataset_format import InputError, MIMICtrajectoryDataset
from medgemma_clinical.data import dka, table_files
from medgemma_clinical.data.findings import Findings
from slow_dka import HOURS, UNITS, observations, read_slowly, union
from trajectories import LABEL, SERIES, dataset_of, one_series, table_of

SECRET = "98765"
"""Stands in every cell that could hold it; no message may repeat what a patient's cell holds."""

# --------------------------------------------------------------------------- series

SPACES = " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2009\u2028\u202f\u205f\u3000"
NEARLY = "0123456789.+-eEhH()<>_,;:'\"xnaif\x00\u0660\uff11\u2212\u2192\u200b\u180e\ufeff" + SPACES
"""What a slip of the hand, a spreadsheet or another program may put into a series."""

MANTISSAS = ["0", "7", "24", "007", "3.", "3.50", ".5", "9007199254740993", "179769313486231570000"]
EXACT = ["0.1000000000000000055511151231257827", "2.2250738585072011", "4.35", "8.41"]
EXPONENTS = ["", "", "", "e0", "E2", "e+3", "e-05", "e16", "e-310", "E-400"]
EDGES = ["3.4028234663852886e38", "3.4028235e38", "-1e39", "1e999", "1000000.0000000002", "-1e6"]
TIMES = ["0", "0.0", "-0", "1", "1.0", "1e0", "2.5", "24", "-5", "72", "1e6", "1e-7", "720"]


def piece(rng):
    """Write a value and its hour, any way that the contract allows."""
    number = rng.choice(
        [str(rng.randint(0, 300)), repr(rng.uniform(0, 10.0 ** rng.randint(-9, 38)))]
    )
    if rng.random() < 0.4:
        number = rng.choice(MANTISSAS + EXACT) + rng.choice(EXPONENTS)
    hours = rng.choice([rng.choice(TIMES), repr(rng.uniform(-1e6, 1e6)), f"{rng.gauss(0, 99):.1f}"])
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


EXAMPLES = ["24 (2150-01-01)", "24 (10:30)", "24 (0)", "24 (30min)", "24 (2 days)", "24,5 (0h)"]
EXAMPLES += ["24 (0h) 20 (2h)", "24 (0h) ->", "-> 24 (0h)", "24 (0 hos)", "24 (0h)\0", "9" * 20_000]


def bits(numbers):
    """Write numbers so that only the same floats, the sign of zero included, are equal."""
    return [None if x is None or x != x else float(x).hex() for x in numbers]


@pytest.mark.parametrize("seed", range(6))
def test_the_parser_reads_random_texts_as_a_plain_one(seed, tmp_path, monkeypatch):
    rng, path = Random(seed), tmp_path / "data.csv"
    monkeypatch.setattr(dka, "BLOCK_ROWS", rng.choice([7, 1000]))
    texts = [*EXAMPLES, *(series_text(rng) for _ in range(60))]
    found = {text: observations(text) for text in texts}
    good, bad = ([text for text in texts if (found[text] is None) is no] for no in (False, True))
    assert min(len(good), len(bad)) > 15
    findings = Findings("texts", strict=False)  # refuses rows, not the table
    (mixed,) = read_chunks(table_of(texts), 20, findings, len(texts))
    assert [texts[row] for row in sorted(findings.problems)] == bad
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([(SERIES, LABEL), *((text, 0) for text in good)])
    for dataset in (mixed, dataset_of(good), MIMICtrajectoryDataset(path)):
        assert len(dataset) == len(good)
        for i, text in enumerate(good):
            times, values = map(bits, one_series(dataset, i))
            expected = union([found[text]], 20)
            assert [times, values] == [bits(x) for x in zip(*expected, strict=True)], repr(text)
    for text in bad[::3]:
        with pytest.raises(InputError, match=f"row 0, column {SERIES}: ") as caught:
            dataset_of([text])
        assert len(text) < 5 or text not in str(caught.value)


# --------------------------------------------------------------------------- files

UREA = "trajectory_urea\nnitrogen [mg/dL]"
"""A further series; a spreadsheet breaks long headings into lines."""

PATIENTS = [f"{SECRET} {name}" for name in ("007", "NA", "Müller, Jörg", 'so "called"', "\u4e2d")]
PATIENTS += ["1", "01.0", "00", " 1.00 ", "1.5"]
CONTEXTS = ["", f"54-year-old {SECRET}, man", f'"{SECRET}"\r\n{SECRET}', f" {SECRET}\t"]
CELLS = {
    SERIES: [f"{SECRET}.{abs(k)} (0h) -> -{SECRET} ({k}h)" for k in range(-9, 9)],
    UREA: ["", f"{SECRET}(0h)", f" {SECRET}\u00a0(2h) ->\n +{SECRET}e1 (-1.5h) "],
    LABEL: ["0", "1", "1", "0", "1.0", " 0 ", "True", "FALSE"],
    "subject_id": PATIENTS,
    "id": [*PATIENTS, "", *map(str, range(20))],
    "clinical_context": CONTEXTS,
    "split": ["train"] * 30 + ["Train", "val", " test"],
    HOURS: ["", "8", "9.5 ", "1e3"],
    "static_x [kg]": ["", " 2.5 ", "-1e2", "0"],
    "static_y": ["1", "TRUE", "false", ""],
    "note": ["", f"{SECRET}, {SECRET}", "1"],
}
WRONG = ["", " ", "37,5", *f"3.99 2 nan -1 \uff11 1e999 val {SECRET} \x00{SECRET}".split(" ")]
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


def read_chunks(table, max_len, findings, max_rows):
    """Read the rows of a table to be scored, with all that it holds as inputs."""
    series = {"Anion gap": "mEq/L"} | ({"urea nitrogen": "mg/dL"} if UREA in table else {})
    static = [name for name in table if name.startswith("static_")]
    config = {
        "features": [*series],
        "units": [*series.values()],
        "outcome": "Escalation",
        "question": "",
        "inputs": {"static": static, "prediction_time": "prediction_hours" in table},
        "read_options": {"max_len": max_len, "label_column": LABEL},
    }
    rows = MIMICtrajectoryDataset.scoring_rows(table, config, findings, max_rows)
    return [chunk.dataset for chunk in rows]


def content_of(dataset):
    """All of a data set by the number of the row, as ``read_slowly`` gives it."""
    found = {}
    parts = [""] * len(dataset) if dataset.parts is None else dataset.parts.tolist()
    hours = dataset.prediction_hours
    for i, n in enumerate(dataset.numbers.tolist()):
        rows = slice(dataset.offsets[i], dataset.offsets[i + 1])
        table = np.column_stack([dataset.times[rows], dataset.values[rows]])
        label = None if np.isnan(dataset.labels[i]) else dataset.labels[i]
        asked = [None] if hours is None else bits([hours[i]])
        about = label, dataset.contexts[i], parts[i], asked, bits(dataset.static[i])
        found[n] = (dataset.ids[i], dataset.groups[i], *about, [*map(bits, table)])
    return found


def with_bits(content, chunk):
    """The same of a slow reading; a chunk has no parts."""
    return {
        n: (*about, "" if chunk else part, bits([asked]), bits(static), [*map(bits, table)])
        for n, (*about, part, asked, static, table) in content.items()
    }


def source_of(rows, form, rng, folder):
    """Write rows in a form; return what is read, its rows by number, those with too many cells."""
    frame, numbered = pd.DataFrame(rows), dict(enumerate(rows))
    if form in ("DataFrame", "chunk"):
        if form == "DataFrame" and "subject_id" in frame:
            frame = frame.set_index("subject_id", drop=rng.random() < 0.5)
        return frame, numbered, set()
    path = folder / f"data.{form}"
    if form == "parquet":
        frame.to_parquet(path)
        return path, numbered, set()
    content, numbered, longer = write(rows, rng, too_long=0.01)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path, numbered, longer


def load(source, **options):
    """Read a source: the data set, or the one line that refuses it."""
    try:
        return MIMICtrajectoryDataset(source, **options)
    except InputError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert SECRET not in message
    name = "DataFrame" if isinstance(source, pd.DataFrame) else str(source)
    assert message.startswith(name)
    return message.removeprefix(name)


@pytest.mark.parametrize("form", ["csv", "csv.gz", "CSV", "parquet", "DataFrame", "chunk"])
def test_a_table_loads_with_what_it_holds_or_names_the_place(form, tmp_path, monkeypatch):
    seen, read, chunk = Counter(), table_files.read_tables, form == "chunk"
    for seed in range(20):
        rng = Random(f"{form} {seed}")
        made = known_rows(rng, wrong=rng.random() < 0.5)
        source, rows, longer = source_of(made, form, rng, tmp_path)
        max_rows, most = rng.choice([1, 3, 1000]), rng.choice([None, 1, 3])
        series = [name for name in made[0] if name == UREA]  # the main one first
        series.insert(0, SERIES)
        content, wrong = read_slowly(rows, series, most or (20, 64)[len(series) > 1], chunk=chunk)
        if chunk:
            findings, found = Findings("chunk", strict=False), {}
            for dataset in read_chunks(source, most, findings, max_rows):
                found |= content_of(dataset)
            assert found == with_bits(content, chunk)
            assert {*findings.problems} == {n for n, _ in wrong}
            continue
        monkeypatch.setattr(table_files, "read_tables", partial(read, max_rows=max_rows))
        found = load(source, max_len=most)
        seen[type(found).__name__] += 1
        if isinstance(found, MIMICtrajectoryDataset):
            assert not longer | wrong
            assert content_of(found) == with_bits(content, chunk)
        elif not (content or wrong or longer):
            assert found.startswith((": no rows below the header", ": no row holds a value"))
        else:
            place = re.match(r", row (\d+)(?:, column (.+?))?: ", found)
            assert place, found
            shown = {(str(n), name.replace("\n", "\\n")) for n, name in wrong}
            assert place.groups() in shown | {(str(n), None) for n in longer}, found
    assert chunk or (len(seen) == 2 and min(seen.values()) >= 5), seen


def test_a_damaged_file_is_refused_in_one_line_or_still_has_its_content(tmp_path):
    seen = Counter()
    for seed in range(80):
        rng = Random(seed)
        rows = known_rows(rng, wrong=False)
        comma, longer = rng.choice([(",", 0), (",", 0), (",", 1), (";", 0)])
        content = bytearray(write(rows, rng, comma, longer)[0])
        packed = rng.random() < 0.4
        if packed:
            content = bytearray(gzip.compress(content, mtime=0))
        sound = comma == "," and not longer
        for _ in range(sound * rng.randint(0, 2)):
            new = rng.choice([*b'",\r\n\0 ;(h)->09', rng.randint(0, 255)])
            content[rng.randint(len(content) // 2, len(content) - 1)] = new
        end = rng.randint(0, len(content)) if sound and rng.random() < 0.5 else len(content)
        path = tmp_path / ("data.csv.gz" if rng.random() < 0.1 or packed else "data.csv")
        path.write_bytes(content[:end])
        found = load(path)
        seen[type(found)] += 1
        assert isinstance(found, str) or sound, seed
    assert min(seen.values()) >= 5
    assert len(seen) == 2
