"""Random input, the same in every run: series, files, command lines. None gives a traceback.

Hypothesis draws a generator for each example, not each choice: of what it makes from single choices
five in six are near copies of the one before. What fails is shown in full.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis.configuration import set_hypothesis_home_dir

import dataset_format
import medgemma_trainer as trainer
import srtr_dataset
from conftest import sign_table
from dataset_format import Findings, InputError, MIMICtrajectoryDataset
from srtr_files import filler, write_folder
from trajectories import LABEL, SERIES, dataset_of, one_series, table_of

SECRET = "98765"
"""Stands in every cell that could hold it; no message may repeat what a patient's cell holds."""


def fuzz(check: Callable[[Random], None], examples: int) -> None:
    """Call a check with so many generators, the same in every run, and keep nothing on the disk."""
    keep_nothing = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    keep_nothing(given(st.randoms(use_true_random=True))(check))()


@pytest.fixture(scope="module", autouse=True)
def _no_folder_in_the_checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
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


def piece(rng: Random) -> str:
    """Write a value and its hour, any way that the contract allows."""
    value = rng.choice(["", "", "-", "+"]) + rng.choice(
        [
            str(rng.randint(0, 300)),
            repr(rng.uniform(0, 10.0 ** rng.randint(-9, 38))),
            rng.choice(MANTISSAS + EXACT) + rng.choice(EXPONENTS),
        ]
    )
    hours = rng.choice([rng.choice(HOURS), repr(rng.uniform(-1e6, 1e6)), f"{rng.gauss(0, 99):.1f}"])
    odd = rng.random() < 0.5
    spaces = ["" if rng.random() < 0.7 else rng.choice(SPACES) for _ in range(6 * odd)]
    around = spaces or ["", " ", "", "", "", " "]
    return "".join(a + b for a, b in zip(around, [value, "(", hours, "h", ")", ""], strict=True))


def series_text(rng: Random) -> str:
    """Write a series, now and then a long one, and spoil every other one."""
    pieces = [piece(rng) for _ in range(rng.randint(1, 30 if rng.random() < 0.1 else 4))]
    text = "->".join(pieces)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        place, cut = rng.randint(0, len(text)), rng.randint(0, 2)
        new = rng.choice(["", "->", "nan", "inf", "(0h)", rng.choice(EDGES), rng.choice(NEARLY)])
        text = text[:place] + new + text[place + cut :]
    return text


def reference_number(text: str) -> float | None:
    """Read a sign, digits with a point among them, an exponent; None for all else."""

    def digits(part: str, *, signed: bool) -> str | None:
        part = part[1:] if signed and part[:1] in ("+", "-") else part
        return part if all(c in "0123456789" for c in part) else None

    mantissa, letter, exponent = text.replace("E", "e").partition("e")
    whole, _, behind = mantissa.partition(".")
    known = digits(whole, signed=True), digits(behind, signed=False)
    if None in known or known == ("", ""):
        return None
    return float(text) if not letter or digits(exponent, signed=True) else None


def reference(text: str) -> list[tuple[float, float]] | None:
    """Read (hours, value) by time, the latest 20; None where the contract refuses the text."""
    pairs = []
    for part in text.split("->"):
        value, _, rest = part.partition("(")
        inner, bracket, behind = rest.partition(")")
        time, letter, more = inner.partition("h")
        number, hour = reference_number(value.strip()), reference_number(time.strip())
        if not bracket or not letter or behind.strip() or more.strip():
            return None
        if number is None or hour is None:
            return None
        if abs(number) > 3.4028234663852886e38 or abs(hour) > 1e6:
            return None
        pairs.append((hour, number))
    return sorted(pairs, key=lambda pair: pair[0])[-20:]


def bits(pairs: Sequence[tuple[float, float]]) -> list[tuple[str, str]]:
    """Write numbers so that only the same floats, the sign of zero included, are equal."""
    return [(time.hex(), value.hex()) for time, value in pairs]


def test_the_parser_agrees_with_a_plain_one_on_5000_texts(tmp_path: Path) -> None:
    seen: dict[str, bool] = {}
    path = tmp_path / "data.csv"

    def agree(rng: Random) -> None:
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

    fuzz(agree, 100)
    assert len(seen) >= 5000
    assert min(Counter(seen.values()).values()) >= 1500


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

Row = dict[str, str]


class Written(NamedTuple):
    """A file, its rows by number as a spreadsheet counts, and the numbers of rows with too much."""

    content: bytes
    rows: dict[int, Row]
    longer: set[int]


def known_rows(rng: Random, *, wrong: bool) -> list[Row]:
    """Make up to six rows of any columns, with a wrong cell or two where that is wanted."""
    chosen = [name for name in CELLS if name in (SERIES, LABEL) or rng.random() < 0.5]
    rng.shuffle(chosen)
    rows = [{name: rng.choice(CELLS[name]) for name in chosen} for _ in range(rng.randint(1, 6))]
    for _ in range(wrong * rng.randint(1, 2)):
        rng.choice(rows)[rng.choice(chosen)] = rng.choice(WRONG)
    return rows


def field(cell: str, rng: Random) -> str:
    """Write a cell, in quotes where it needs them and sometimes where not, after a space or two."""
    quoted = rng.random() < 0.3 or re.search('[,;"\r\n]', cell)
    written = '"' + cell.replace('"', '""') + '"' if quoted else cell
    return " " * rng.choice([0, 0, 0, 1, 2]) + written


def write(rows: list[Row], rng: Random, comma: str = ",", too_long: float = 0.0) -> Written:
    """Write rows as one of the many kinds of CSV, a share of them with a cell too much."""
    end = rng.choice(["\n", "\n", "\r\n", "\r"])
    numbered: dict[int, Row] = {}
    longer, lines, number, width = set(), [], 0, 0
    for row in [{name: name for name in rows[0]}, *rows]:
        blank = rng.choice(PLACES)
        cells = [field(cell, rng) for cell in row.values()]
        while cells[-1].strip() == "" and rng.random() < 0.5:
            cells.pop()  # a short row lacks its last cells
        number += 1 + blank.count("\n")
        cells += [""] * rng.choice([0, 0, 0, 2])
        width = width or len(cells)  # of the header
        if numbered and rng.random() < too_long:
            cells += [""] * (width - len(cells)) + [SECRET]
            longer.add(number)
        lines.append(blank.replace("\n", end) + comma.join(cells))
        numbered[number] = row
    text = end.join(lines) + end * rng.randint(0, 2)
    del numbered[min(numbered)]
    blank_rows = {n for n, row in numbered.items() if not any(map(str.strip, row.values()))}
    kept = {n: row for n, row in numbered.items() if n not in blank_rows - longer}
    mark = rng.choice(["", "", "\ufeff"])
    return Written((mark + text).encode(), kept, longer)


def wrong_places(rows: dict[int, Row]) -> set[tuple[int, str]]:
    """Find each cell that the README's table of columns does not allow."""
    found = set()
    sides: dict[str, str] = {}
    for number, row in rows.items():
        cells = {name: cell.strip() for name, cell in row.items()}
        series = {name: cells[name] for name in (SERIES, UREA) if name in cells}
        found |= {(number, n) for n, text in series.items() if text and reference(text) is None}
        if not any(series.values()):
            found.add((number, SERIES))
        if cells[LABEL] not in ("0", "1", "1.0"):
            found.add((number, LABEL))
        patient = next((n for n in ("subject_id", "id") if n in cells), None)
        if patient and not cells[patient]:
            found.add((number, patient))
        if "split" in cells:
            side = cells["split"].lower().replace("validation", "val")
            name = cells[patient] if patient else str(number)
            if side not in ("train", "val", "test") or sides.setdefault(name, side) != side:
                found.add((number, "split"))
    return found


def same_content(dataset: MIMICtrajectoryDataset, rows: dict[int, Row]) -> None:
    """Compare a data set with the rows that were written."""
    known = [{name: cell.strip() for name, cell in row.items()} for row in rows.values()]
    numbered = zip(map(str, rows), known, strict=True)
    patients = [row.get("subject_id", row.get("id", number)) for number, row in numbered]
    names = [row.get("id", patient) for row, patient in zip(known, patients, strict=True)]
    assert dataset.labels.tolist() == [float(row[LABEL]) for row in known]
    assert dataset.groups.tolist() == patients
    assert dataset.ids.tolist() == names
    assert dataset.contexts.tolist() == [row.get("clinical_context", "") for row in known]
    parts = [row["split"].lower() for row in known] if "split" in known[0] else None
    assert (None if dataset.parts is None else dataset.parts.tolist()) == parts
    columns = [SERIES, *([UREA] if UREA in known[0] else [])]
    for i, row in enumerate(known):
        found = {f: list(zip(t, v, strict=True)) for f, t, v in dataset.measured(i)}
        for f, column in enumerate(columns):
            written = reference(row[column]) if row[column] else []
            assert bits(found.get(f, [])) == bits(written or [])


def load(path: Path) -> MIMICtrajectoryDataset | str:
    """Read a file: the data set, or the one line that refuses it."""
    try:
        return MIMICtrajectoryDataset(path)
    except InputError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert message.startswith(str(path))
    assert SECRET not in message
    return message.removeprefix(str(path))


def test_a_file_loads_with_what_it_holds_or_names_the_place(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    def load_or_name(rng: Random) -> None:
        written = write(known_rows(rng, wrong=rng.random() < 0.5), rng, too_long=0.01)
        note(repr(written.content))
        path = tmp_path / rng.choice(["data.csv", "data.csv.gz", "DATA.CSV"])
        zipped = path.suffix == ".gz"
        path.write_bytes(gzip.compress(written.content) if zipped else written.content)
        wrong = wrong_places(written.rows)
        found = load(path)
        seen[type(found).__name__] += 1
        if isinstance(found, MIMICtrajectoryDataset):
            assert not wrong | written.longer
            same_content(found, written.rows)
        elif not written.rows:
            assert found.startswith(": no rows below the header")
        else:
            place = re.match(r", row (\d+)(?:, column (.+?))?: ", found)
            assert place, found
            number, column = int(place[1]), place[2]
            shown = {(n, name.replace("\n", "\\n")) for n, name in wrong}
            assert (number, column) in shown or (column is None and number in written.longer), found

    fuzz(load_or_name, 1000)
    assert min(seen.values()) >= 300, seen


def damages(rng: Random, rows: list[Row]) -> tuple[str, bytes, str | None]:
    """Damage a good file: its name, its bytes, and what refuses it; None where luck decides."""
    good = write(rows, rng).content
    place = rng.randint(0, len(good) - 1)
    columns = list(rows[0])
    needed = rng.choice([SERIES, LABEL])
    twice = rng.choice([name for name in columns if name not in (UREA, "note")])
    renamed = [{("x" if n == needed else n): c for n, c in row.items()} for row in rows]
    packed = gzip.compress(good)
    cut = rng.randint(1, len(packed) - 1)
    flipped = bytearray(packed)
    flipped[rng.randint(0, len(packed) - 1)] ^= 1 << rng.randint(0, 7)
    edited = bytearray(good)
    for _ in range(rng.randint(1, 2)):
        new = rng.choice([*b'",\r\n\0 ;(h)->09', rng.randint(0, 255)])
        edited[rng.randint(len(good) // 2, len(good) - 1)] = new
    again = ",".join(f'"{cell}"' for cell in [*columns, twice]).encode() + b"\n"
    opened = [field(cell, rng).strip(' "') for cell in rows[0].values()]
    opened[rng.randint(0, len(opened) - 1)] = f'"{SECRET}'
    last = b"\n" + ",".join(c for c in opened).encode()
    return rng.choice(
        [
            ("data.csv", good[:place] + b"\xff" + good[place:], ": not a text file in UTF-8"),
            ("data.csv", good.decode().encode("utf-16"), ": not a text file in UTF-8"),
            ("data.csv", rng.choice([b"", b"\n \r\n", b"\xef\xbb\xbf"]), ": the file is empty"),
            ("data.csv", again[: again.rindex(b",")], ": no rows below the header"),
            ("data.csv", again + good, f", row 1, column {twice}: stands there twice"),
            ("data.csv", write(renamed, rng).content, f", row 1, column {needed}: no such column"),
            ("data.csv", write(rows, rng, ";").content, ", row "),
            ("data.csv", b"".join([good.rstrip(), last]), ", row "),
            ("data.csv.gz", packed[:cut], ": not a whole gzip file"),
            ("data.csv.gz", good, ": not a whole gzip file"),
            ("data.csv.gz", bytes(flipped), None),
            ("data.csv", bytes(edited), None),
            ("data.csv", good[:place], None),
        ]
    )


def test_a_damaged_file_is_refused_in_one_line_or_still_has_its_content(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    def refuse(rng: Random) -> None:
        rows = known_rows(rng, wrong=False)
        name, content, expected = damages(rng, rows)
        note(repr(content))
        path = tmp_path / name
        path.write_bytes(content)
        found = load(path)
        seen[type(found).__name__] += 1
        assert expected is None or str(found).startswith(expected), found

    fuzz(refuse, 800)
    assert min(seen.values()) >= 10, seen


# --------------------------------------------------------------------------- command lines

DATA = "dka_training_data.csv"
ODD_NAME = os.fsdecode(b"Caf\xe9.csv")
"""A name in Latin-1, as an old archive unpacks it."""

ENCODER = f"run/{trainer.TRAJECTORY_FILE}"
PATHS = f"{DATA} new.csv several.csv wrong.csv empty.csv missing.csv srtr run folder".split()
PATHS += f"run/trajectory other/trajectory broken/best broken.pt {ENCODER} {ODD_NAME} .".split()
PATHS += f".. out.csv out.txt missing/out.csv {DATA}/x {{seed}}.pt ~ * \u4e2d.csv none".split()
PATHS += ["", " ", "two\nlines.csv", "\x1b[31m", "x" * 300]
GOOD_NUMBERS = ["1", "2", "3", "8", "16", "30", "200", "0", "0.5", "1e-3", " 4 ", "1_0", "72.0"]
ODD_NUMBERS = ["-1", "nan", "inf", "-inf", "1e400", "1e-400", "0x10", "\uff11", "1,5", "true"]
ODD_NUMBERS += [str(10**k) for k in (9, 10, 19, 30, 307)] + ["9" * 400, "9" * 5000, "1\n"]
ODD_WORDS = ["--", "-", "-x", "", "--no_such_flag", "a b", "-1", "--help", "%s", "{seed}", "'"]
TEXTS = {
    "model_name": ["tiny"] * 6 + ["google/medgemma-4b-pt", "folder", "no such", "a\nb", "a/b/c"],
    "log_file": ["none", "none", "auto", "own.log", "missing/own.log", "folder"],
    "solver": ["rk4", "euler", "dopri5", "midpoint", "scipy_solver", "rk5", "Rk4", "a\nb"],
    "precision": ["auto", "fp32", "bf16", "fp16", "half", "fp\n32"],
    "series": ["urea", "anion gap", "Urea,anion_gap", "urea,urea", "kalium", ",", "a\nb", "\u2028"],
}
BEGINNINGS = [
    *[""] * 10,
    *["--trajectory_only"] * 6,
    "--trajectory_only --dry_run",
    "--trajectory_only --dataset srtr --data_dir srtr",
    "--trajectory_only --seeds 2",
    "--model_name tiny",
    "--model_name tiny --mode generative",
    "--model_name tiny --dry_run --soft_prompt off",
    f"--model_name tiny --ode_checkpoint {ENCODER}",
    "--model_name tiny --ablation",
    "--demo",
    *["--compare run/trajectory other/trajectory"] * 2,
    "--predict --checkpoint run/trajectory --data_path new.csv --predictions out.csv",
    *[f"--predict --checkpoint {ENCODER} --predictions out.csv --data_path {ODD_NAME}"] * 2,
]
"""What leads to each of the program's ways; the rest of a command is left to chance."""


class StartedError(BaseException):
    """The command would now begin to learn or to score."""


class Said(NamedTuple):
    """How a command ended, and what it wrote to stdout and stderr."""

    end: Any
    out: str
    err: str


def say(main: Callable[[Sequence[str]], int], words: list[str]) -> Said:
    """Run a command with streams like those of a terminal in UTF-8."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    note(repr(words))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            end: Any = main(words)
        except SystemExit as stop:
            end = f"parser {stop.code}"
        except StartedError:
            end = "started"
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return Said(end, *texts)


def check_said(said: Said) -> None:
    """Require one line for whatever is refused, nothing on stderr else, never a traceback."""
    assert "Traceback" not in said.out + said.err
    if said.end in ("parser 2", 2, 3):
        assert re.fullmatch(r"error: [^\n]+\n", said.err)
        assert len(said.err.splitlines()) == 1
    else:
        assert said.end in ("parser 0", 0, "started")
        assert said.err == ""


def value(action: argparse.Action, rng: Random) -> str:
    """Give a word for a flag, more often a good one than any of the others."""
    if rng.random() < 0.1:
        return rng.choice([*PATHS, *ODD_NUMBERS, *ODD_WORDS])
    if action.choices:
        return str(rng.choice([*action.choices, *action.choices, "x"]))
    if action.dest in TEXTS:
        return rng.choice(TEXTS[action.dest])
    if action.type is Path:
        return rng.choice(PATHS)
    return rng.choice(rng.choice([*[GOOD_NUMBERS] * 3, ODD_NUMBERS]))


def command_line(actions: list[argparse.Action], rng: Random) -> list[str]:
    """Begin as a command may, add flags, and now and then lose, repeat or slip in a word."""
    words = rng.choice(BEGINNINGS).split()
    for action in rng.sample(actions, rng.choice([0] + [1, 2, 3] * 5 + [2, 5])):
        flag = rng.choice(action.option_strings)
        values = [] if action.nargs == 0 else [value(action, rng)]
        joined = values and rng.random() < 0.2
        words += [f"{flag}={rng.choice([*values * 9, '--'])}"] if joined else [flag, *values]
    if words and rng.random() < 0.2:
        place = rng.randrange(len(words))
        words[place : place + 1] = rng.choice([[], [words[place]] * 2, [rng.choice(ODD_WORDS)]])
    return words


def make_world(folder: Path) -> None:
    """Fill a folder with small data of every kind, and with results of two runs."""
    table = sign_table(40, seed=3)
    table.to_csv(folder / DATA, index=False)
    shutil.copy(folder / DATA, folder / ODD_NAME)
    table.drop(columns=LABEL).to_csv(folder / "new.csv", index=False)
    urea = ["", "5 (1h)", "7 (0h) -> 8 (3h)", "1 (9h)"] * 10
    several = table.assign(**{"trajectory_urea [mg/dL]": urea})
    several.to_csv(folder / "several.csv", index=False)
    table.assign(**{LABEL: [2] + [0] * 39}).to_csv(folder / "wrong.csv", index=False)
    (folder / "empty.csv").touch()
    (folder / "broken.pt").write_bytes(b"PK\x03\x04 junk")
    (folder / "folder").mkdir()
    write_folder(folder / "srtr", *filler("kidney"), "kidney")
    args = trainer.resolve(trainer.build_parser().parse_args(["--data_path", str(folder / DATA)]))
    stage = trainer.trajectory_stage(args, trainer.load_data(args))
    rows = pd.DataFrame({"id": range(20), "patient": range(20), "label": [0, 1] * 10})
    for name, scores in {"run": [0.2, 0.9, 0.4, 0.3], "other": [0.1, 0.8, 0.7, 0.6]}.items():
        (folder / name / "trajectory").mkdir(parents=True)
        stage.save(folder / name / "trajectory")
        scored = rows.assign(probability=scores * 5)
        scored.to_csv(folder / name / "trajectory" / "predictions_test.csv", index=False)
    (folder / "broken" / "best").mkdir(parents=True)
    (folder / "broken" / "best" / "config.json").write_text("[]")


def listing(folder: Path) -> dict[str, int]:
    """Give each file and folder below, files with their size."""
    return {str(p): p.stat().st_size if p.is_file() else -1 for p in folder.rglob("*")}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Stand in a folder as ``make_world`` makes it; give what restores it."""
    made, here = tmp_path / "made", tmp_path / "box" / "here"
    made.mkdir()
    make_world(made)

    def restore() -> None:
        os.chdir(tmp_path)
        shutil.rmtree(here.parent, ignore_errors=True)
        shutil.copytree(made, here)
        os.chdir(here)

    def start(*_: Any) -> None:
        raise StartedError

    for name in ("evaluate", "train_epoch", "predict_rows"):
        monkeypatch.setattr(trainer, name, start)
    monkeypatch.setattr(trainer, "SAMPLE_DATA", made / DATA)
    monkeypatch.chdir(tmp_path)
    restore()
    return restore


def test_2000_command_lines_give_no_traceback(world: Callable[[], None]) -> None:
    actions = trainer.build_parser()._actions
    seen: Counter[Any] = Counter()
    lines: set[tuple[str, ...]] = set()

    def speak(rng: Random) -> None:
        words = command_line(actions, rng)
        lines.add(tuple(words))
        before = listing(Path(".."))
        said = say(trainer.main, words)
        check_said(said)
        seen[said.end] += 1
        if said.end == 2 and not any(word.startswith("--cache_dir") for word in words):
            assert listing(Path("..")) == before
        elif not str(said.end).startswith("parser"):
            world()  # also where a cache was kept, or its folder made, before the run was refused

    fuzz(speak, 2200)
    assert len(lines) >= 2000
    assert min(seen[end] for end in ("started", 2, "parser 2")) >= 200, seen


def test_the_commands_that_check_data_give_no_traceback(world: Callable[[], None]) -> None:
    seen: Counter[Any] = Counter()
    flags = ["--series", "--max_len", "--organ", "--landmark_days", "--transplant", "--data_dir"]
    others = ["kidney", "liver", "negative", *TEXTS["series"], *GOOD_NUMBERS, *ODD_NUMBERS]

    def speak(rng: Random) -> None:
        main, beginning = rng.choice(
            [
                (dataset_format.main, ["check", rng.choice(PATHS)]),
                (dataset_format.main, ["check", rng.choice([DATA, "several.csv", ODD_NAME])]),
                (srtr_dataset.main, ["check", "--data_dir", rng.choice(["srtr", *PATHS])]),
                (rng.choice([dataset_format.main, srtr_dataset.main]), ["check"]),
            ]
        )
        words = list(beginning)
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            words += [rng.choice(flags), rng.choice([*others, *PATHS])]
        if rng.random() < 0.1:
            words[rng.randrange(len(words))] = rng.choice(ODD_WORDS)
        said = say(main, words)
        check_said(said)
        seen[said.end] += 1

    fuzz(speak, 500)
    assert min(seen[end] for end in (0, 2, "parser 2")) >= 30, seen
