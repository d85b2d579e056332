"""Tests of DKA files that are refused, kinds of CSV that are read, and the check command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import dataset_format
from dataset_format import InputError, MIMICtrajectoryDataset

ROOT = Path(dataset_format.__file__).parent
SAMPLE = ROOT / "tests" / "data" / "physionet2012_bicarbonate.csv"
HEADER = "clinical_trajectory,label_escalation\n"
GOOD = [f'"24 (0h) -> {10 + k} (2.5h)",{k % 2}\n' for k in range(20)]
SECRET = "98765"
"""Stands in the cells that are refused; no message may repeat what a patient's cell holds."""

TRAJECTORY, LABEL = "clinical_trajectory", "label_escalation"


def text(*last: str, header: str = HEADER, before: str = "") -> bytes:
    """Make a file of twenty good rows (2 to 21) and what shall stand behind them."""
    return (header + "".join(before + row for row in GOOD) + "".join(last)).encode()


def first(*rows: str) -> bytes:
    """Make a file whose bad rows stand first, from row 2."""
    return (HEADER + "".join(rows) + "".join(GOOD)).encode()


def with_column(name: str, cells: list[str]) -> bytes:
    rows = (f"{cell},{row}" for cell, row in zip(cells, GOOD, strict=True))
    return (f"{name},{HEADER}" + "".join(rows)).encode()


def one_cell(name: str, usual: str, place: int, cell: str) -> bytes:
    cells = [usual.format(k) for k in range(20)]
    cells[place] = cell
    return with_column(name, cells)


SPLIT = ["train", "train", "val", "val", "test", "test"] + ["train"] * 14
TWO_SIDES = (
    f"split,subject_id,{HEADER}"
    + "".join(f"{SPLIT[k]},{SECRET if k in (1, 4) else k},{GOOD[k]}" for k in range(20))
).encode()

# content, what the message must hold beside the file's name (regular expressions)
BAD_FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["empty"]),
    "line breaks only": (b"\n\n\n", ["empty"]),
    "header only": (HEADER.encode(), ["no rows"]),
    "wrong columns": (
        b"age,clinical_trajectorie\n98765,1\n",
        ["row 1", TRAJECTORY, "did you mean clinical_trajectorie", "age, clinical_trajectorie"],
    ),
    "no label column": (b'clinical_trajectory\n"98765 (0h)"\n', ["row 1", LABEL]),
    "no header": (
        f'"{SECRET} (0h)",1\n'.encode() * 20,
        ["row 1", TRAJECTORY, "is the header missing"],
    ),
    "no header, a name first": (
        f'{SECRET}-a,"24 (0h) -> 20 (2h)",1\n'.encode() * 20,
        ["row 1", TRAJECTORY, "is the header missing"],
    ),
    "a piece without brackets": (
        text(f'"24 (0h) -> 20 2h -> {SECRET} (4h)",0\n'),
        ["row 22", TRAJECTORY, "piece 2"],
    ),
    "a piece without arrow": (text(f'"1 (0h) {SECRET} (4h)",0\n'), ["row 22", "piece 1"]),
    "an arrow at the end": (text(f'"{SECRET} (0h) ->",0\n'), ["row 22", TRAJECTORY, "piece 2"]),
    "words": (first(f"patient {SECRET},0\n"), ["row 2", TRAJECTORY, "piece 1"]),
    "minutes": (text(f'"{SECRET} (30min)",0\n'), ["row 22", TRAJECTORY, "piece 1 is in minutes"]),
    "a decimal comma": (text(f'"{SECRET},5 (0h)",0\n'), ["row 22", TRAJECTORY, "piece 1", "comma"]),
    "a date": (text(f'"{SECRET} (2150-01-01)",0\n'), ["row 22", TRAJECTORY, "piece 1", "a date"]),
    "another arrow": (
        text(f'"1 (0h) \u2192 {SECRET} (1h)",0\n'),
        ["row 22", "piece 1", r"U\+2192"],
    ),
    "two bad rows": (
        text('"x",0\n', '"1 (0h)",0\n', '"y",0\n'),
        ["row 22", "2 such rows"],
    ),
    "label 2": (text('"24 (0h)",2\n'), ["row 22", LABEL, "0 or 1"]),
    "label 0.5": (text('"24 (0h)",0.5\n'), ["row 22", LABEL, "0 or 1"]),
    "label as text": (text(f'"24 (0h)",yes{SECRET}\n'), ["row 22", LABEL, "0 or 1"]),
    "empty label": (text('"24 (0h)",\n'), ["row 22", LABEL, "empty"]),
    "empty series": (text(",0\n"), ["row 22", TRAJECTORY, "empty"]),
    "inf": (text('"inf (0h)",0\n'), ["row 22", TRAJECTORY, "piece 1"]),
    "nan": (text('"1 (0h) -> nan (1h)",0\n'), ["row 22", TRAJECTORY, "piece 2"]),
    "1e999": (text('"1e999 (0h)",0\n'), ["row 22", TRAJECTORY, "large"]),
    "a time of 1e999": (text('"1 (-1e999h)",0\n'), ["row 22", TRAJECTORY, "large"]),
    "a time beyond any life": (text('"1 (1700000000h)",0\n'), ["row 22", TRAJECTORY, "large"]),
    "too large for float32": (text('"1e39 (0h)",0\n'), ["row 22", TRAJECTORY, "large"]),
    "PNG": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x01\x00\xff\xfe\xfd", ["UTF-8"]),
    "NUL bytes": (bytes(500), []),
    "a NUL byte in a cell": (text(f'"{SECRET} (0h)\0",1\n'), ["row 22", TRAJECTORY]),
    "UTF-16": (text().decode().encode("utf-16"), ["UTF-8"]),
    "UTF-16 without mark": (text().decode().encode("utf-16-le"), []),
    "Latin-1": (text("").replace(b"24 (0h)", b"24 (0h)\xe9", 1), ["UTF-8"]),
    "semicolons and commas": (
        b'clinical_trajectory;label_escalation;note\n1 (0h);0;"a, b, c"\n2 (0h);1;a, b, c\n',
        ["row 1", "separated by ';'"],
    ),
    "semicolons": (text().replace(b",", b";"), ["row 1", "separated by ';'"]),
    "semicolons behind quotes": (
        b'"clinical_trajectory";"label_escalation"\n"24 (0h)";0\n',
        ["row 1", "separated by ';': .* with points"],
    ),
    "tabs behind quotes": (b'"clinical_trajectory"\t"a"\n', ["row 1", "separated by tabs"]),
    "a name behind quotes": (b'"clinical_trajectory"x,a\n', ["row 1", "check its quotes"]),
    "tabs": (text().replace(b",", b"\t"), ["row 1", "separated by tabs"]),
    "more fields in a late row": (text(f'"24 (0h)",1,{SECRET}\n'), ["(row|line) 22", "quotes"]),
    "more fields in the first row": (first(f'"24 (0h)",1,{SECRET}\n'), ["(row|line) 2", "quotes"]),
    "unquoted commas": (
        with_column("clinical_context", ["54-year-old, man"] * 20),
        ["(row|line) 2", "quotes"],
    ),
    "an open quote": (text(f'"{SECRET} (0h),1\n'), ["(row|line) 2[12]"]),
    "a quote that swallows a row": (
        f'{HEADER.strip()},clinical_context\n1 (0h),0,"{SECRET}\n2 (0h),1,"man"\n'.encode(),
        ["row 2", "quotes"],
    ),
    "fewer fields": (text('"24 (0h)"\n'), ["row 22", LABEL, "empty"]),
    "empty subject_id": (one_cell("subject_id", "{}", 5, " "), ["row 7", "subject_id", "empty"]),
    "bad split": (one_cell("split", "train", 5, SECRET), ["row 7", "split", "train, val or test"]),
    "empty split": (one_cell("split", "train", 5, ""), ["row 7", "split", "train, val or test"]),
    "patient on two sides": (TWO_SIDES, ["row 6", "split", "in another part"]),
    "a part without both classes": (
        with_column("split", ["train"] * 10 + ["val"] * 9 + ["test"]),
        ["split", "test"],
    ),
    "an empty part": (with_column("split", ["train"] * 10 + ["val"] * 10), ["split", "test"]),
    "label column twice": (
        text(header=HEADER.replace("\n", f",{LABEL}\n")).replace(b'h)",', b'h)",1,'),
        ["row 1", LABEL],
    ),
    "label column twice but for a space": (
        text(header=HEADER.replace("\n", f",{LABEL} \n")).replace(b'h)",', b'h)",1,'),
        ["row 1", LABEL],
    ),
    "subject column twice": (
        text(header=f"subject_id,subject_id,{HEADER}", before="1,2,"),
        ["row 1", "subject_id"],
    ),
    "one class": (text().replace(b",1\n", b",0\n"), ["event"]),
    "three rows": ((HEADER + "".join(GOOD[:3])).encode(), ["event"]),
}


def refusal(path: Path) -> str:
    """Read and split ``path`` as a run does; give the one line that refuses it."""
    with pytest.raises(InputError) as caught:
        MIMICtrajectoryDataset(path).split(0)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_its_place_and_without_its_content(
    name: str, tmp_path: Path
) -> None:
    content, expected = BAD_FILES[name]
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    message = refusal(path)
    assert str(path) in message
    assert SECRET not in message
    for pattern in expected:
        assert re.search(rf"{pattern}(?!\d)", message), (pattern, message)


@pytest.mark.parametrize("name", ["words", "label 2", "PNG", "tabs", "one class", "an empty part"])
def test_the_command_ends_with_2_and_one_line_for_a_bad_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(BAD_FILES[name][0])
    assert dataset_format.main(["check", str(path)]) == 2
    output = capsys.readouterr()
    assert re.fullmatch(r"error: .+\n", output.err)
    assert output.out.endswith("not ready\n")
    assert SECRET not in output.out + output.err


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere.csv")
    assert "nowhere.csv" in message
    assert "no such file" in message


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "not a file" in refusal(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "closed.csv"
    path.write_bytes(text())
    path.chmod(0)
    assert "denied" in refusal(path)


@pytest.mark.parametrize("suffix", [".gz", ".zip", ".xlsx"])
def test_a_name_that_promises_another_format_is_no_reason_for_a_traceback(
    suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"bad.csv{suffix}"
    path.write_bytes(b"PK\x03\x04 junk")
    assert path.name in refusal(path)


def test_an_endless_cell_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(text('"' + "1" * 20_000 + 'x",1\n'))
    start = time.monotonic()
    assert "row 22" in refusal(path)
    assert time.monotonic() - start < 2


# --------------------------------------------------------------------------- kinds of CSV


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + text(),
        text().replace(b"\n", b"\r\n"),
        text().rstrip(),
        text().replace(b"\n", b"\n\n"),
        b"\n" + text(),
        text("\n  \n,\n"),
        text(header=HEADER.replace(",", " , ")),
        text().replace(b",", b", "),
        text().replace(b" -> ", b" ->\n"),
        text().replace(b" -> ", b"->").replace(b" (", b"("),
        text().replace(b",1\n", b",1.0\n"),
        text(header="note," + HEADER, before='"a ""b"", c",'),
    ],
    ids=[
        "BOM",
        "CRLF",
        "no newline at the end",
        "blank lines",
        "blank line in front",
        "blank lines at the end",
        "spaces around the names",
        "spaces behind the commas",
        "line breaks within quotes",
        "no spaces",
        "labels as decimals",
        "another column, with quotes",
    ],
)
def test_any_usual_way_to_write_a_csv_reads_the_same(content: bytes, tmp_path: Path) -> None:
    plain, other = tmp_path / "plain.csv", tmp_path / "other.csv"
    plain.write_bytes(text())
    other.write_bytes(content)
    expected, dataset = MIMICtrajectoryDataset(plain), MIMICtrajectoryDataset(other)
    for name in ("times", "values", "offsets", "labels"):
        assert np.array_equal(getattr(dataset, name), getattr(expected, name)), name


@pytest.mark.parametrize(
    ("content", "row"),
    [
        (text("\n\n", '"x",1\n'), 24),
        (text().replace(b"\n", b"\n\n") + b'"x",1\n', 43),
        (first('"1 (0h) ->\n 2 (1h)",1\n') + b'"x",1\n', 23),
        (text('"x",1\n').replace(b"\n", b"\r\n"), 22),
    ],
    ids=["blank lines", "every other line blank", "a line break within quotes", "CRLF"],
)
def test_rows_are_counted_as_a_spreadsheet_shows_them(
    content: bytes, row: int, tmp_path: Path
) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    assert f"row {row}," in refusal(path)


def test_ids_are_kept_as_they_are_written(tmp_path: Path) -> None:
    cells = ["007", "7", "7.0", "NA", "None", "1e3", *map(str, range(100, 114))]
    path = tmp_path / "data.csv"
    path.write_bytes(with_column("subject_id", cells))
    assert MIMICtrajectoryDataset(path).groups.tolist() == cells


# --------------------------------------------------------------------------- the command


def test_a_file_without_any_label_is_fit_to_predict_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new.csv"
    no_column = "clinical_trajectory\n" + '"24 (0h) -> 20 (2h)"\n' * 3
    for content in (no_column, HEADER + '"24 (0h) -> 20 (2h)",\n' * 3):
        path.write_text(content)
        assert dataset_format.main(["check", str(path)]) == 0
        output = capsys.readouterr()
        assert output.err == ""
        assert "rows 3, patients 3" in output.out
        assert output.out.endswith("\nready to predict on, with warnings, no labels to train on\n")
        assert "split" not in output.out
    path.write_text(content + '"24 (0h) -> 20",\n')
    assert dataset_format.main(["check", str(path)]) == 2
    assert "row 5, column clinical_trajectory: piece 2" in capsys.readouterr().err
    path.write_text(content + '"24 (0h)",1\n')
    words = ["check", str(path)]
    assert dataset_format.main(words) == 0  # as --predict reads it
    end = "with warnings, not to train on: 3 of 4 rows have no label: fill or remove these rows\n"
    assert capsys.readouterr().out.endswith(f"\nready to predict on, {end}")


def test_the_content_of_a_refused_cell_is_shown_on_request_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(text(f'"{SECRET},5 (0h)",0\n'))
    assert dataset_format.main(["check", str(path)]) == 2
    error = capsys.readouterr().err
    assert SECRET not in error
    assert error.endswith(" (--show_values shows the cell)\n")
    assert dataset_format.main(["check", "--show_values", str(path)]) == 2
    assert f"it holds '{SECRET},5 (0h)'" in capsys.readouterr().err


def run_check(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "dataset_format.py"), "check", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_summarises_the_sample_data() -> None:
    result = run_check(SAMPLE)
    assert (result.returncode, result.stderr) == (0, "")
    assert "rows 3,850, patients 3,850" in result.stdout
    assert "539 events in 3,850" in result.stdout
    assert "14.0%" in result.stdout
    assert "In-hospital death" in result.stdout
    assert "Serum bicarbonate in mmol/L" in result.stdout
    assert "train 3,080 rows, 3,080 patients, 431 events; val 385 rows" in result.stdout
    assert "warning" not in result.stdout
    assert result.stdout.endswith("\nready\n")


def test_a_users_mistake_gives_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(BAD_FILES["PNG"][0])
    result = run_check(path)
    assert result.returncode == 2
    assert re.fullmatch(r"error: .+\n", result.stderr)


@pytest.mark.parametrize(
    ("content", "warnings"),
    [
        (text(), []),
        (
            text('"240 (0h) -> 200 (2h)",0\n', '"-20 (0h)",0\n'),
            ["Anion gap: 3 of 43 values lie .* mEq/L"],
        ),
    ],
    ids=["nothing wrong", "values"],
)
def test_the_command_warns_of_units_that_look_wrong(
    content: bytes, warnings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    assert dataset_format.main(["check", str(path)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    lines = [line for line in output.out.splitlines() if "lie outside" in line]
    assert all(line.startswith("warning: ") for line in lines)
    assert len(lines) == len(warnings)
    for pattern, line in zip(warnings, lines, strict=True):
        assert re.search(pattern, line), line


def test_the_range_of_a_description_decides_what_looks_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(text())
    path.with_suffix(".json").write_text('{"plausible": [0, 23.5]}')
    assert dataset_format.main(["check", str(path)]) == 0
    assert "26 of 40 values lie outside 0 to 23.5 mEq/L" in capsys.readouterr().out


def test_the_summary_states_sizes_observations_and_spans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [str(k // 2) for k in range(20)]
    path = tmp_path / "data.csv"
    path.write_bytes(with_column("subject_id", cells) + b'99,"1 (0h) -> 2 (1h) -> 3 (50h)",1\n')
    dataset_format.main(["check", str(path)])
    output = capsys.readouterr().out
    assert "rows 21, patients 11" in output
    assert "11 events in 21 labelled rows (52.4%)" in output
    assert re.search(r"observations a row: median 2, quartiles 2 to 2", output)
    assert re.search(r"span in hours: median 2.5, quartiles 2.5 to 2.5", output)


def test_notices_are_part_of_the_commands_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(text('"1 (5h) -> 2 (1h)",1\n'))
    dataset_format.main(["check", str(path)])
    output = capsys.readouterr().out
    assert output.count("1 rows were not in time order") == 1
    assert output.count("no column subject_id") == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["check"], ["chec", "a.csv"], ["check", "a", "b"], ["check", "a", "--ser", "b"]],
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        dataset_format.main(arguments)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
