"""The file that an importer makes: both parts or none, by one writer, of rows that are left."""

import os

import pandas as pd
import pytest

from medgemma_clinical.data.importers import output
from medgemma_clinical.files import InputError, locked

ROWS = pd.DataFrame({"subject_id": [1], "clinical_trajectory": ["20 (0h)"]})
DESCRIPTION = {"made_by": "a test", "rows": {"rows": 1200, "patients": 3, "events": 1}}


def test_a_file_of_another_origin_or_form_is_no_output(tmp_path):
    for name in ("a.csv", "b.json"):
        (tmp_path / name).write_text("{}")
    for name in ("out.txt", "no/such/out.csv", "a.csv", "b.csv"):
        with pytest.raises(InputError, match=f"--out .*{name}: "):
            output.check_target(tmp_path / name)
    output.write_rows(ROWS, DESCRIPTION, tmp_path / "c.csv")
    output.check_target(tmp_path / "c.csv")
    output.check_target(tmp_path / "new.csv")


def make_file(out, make=lambda _: (ROWS, DESCRIPTION)):
    return output.make_file(output.TableRequest(out=out, memory_limit="1GB", threads=1), make)


def test_a_file_has_one_writer_who_removes_what_a_killed_one_spilt(tmp_path):
    with locked(tmp_path / "out.csv"), pytest.raises(InputError, match="another run"):
        make_file(tmp_path / "out.csv")
    for name in (".out.csv.spill-x", ".other.csv.spill-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "values").write_text("patients")
    assert make_file(tmp_path / "out.csv") == 0
    names = {"out.csv", "out.json", ".other.csv.spill-x"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_both_files_are_written_or_none_and_the_description_first(tmp_path, monkeypatch):
    """A table without its description would be read as another series."""
    out, renamed, rename = tmp_path / "out.csv", [], os.replace

    def noted(old, new):
        renamed.append(new.suffix)
        rename(old, new)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", noted)
    output.write_rows(ROWS, DESCRIPTION, out)
    assert renamed == [".json", ".csv"]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"out.csv", "out.json"}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        output.write_rows(ROWS.assign(subject_id=2), DESCRIPTION, out)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_each_candidate_is_removed_by_the_first_rule_that_applies():
    rules = pd.DataFrame({"first": [True, True, False], "second": [True, False, False]})
    left, flow = output.apply_rules(rules, "table", pd.Series(["a", "b", "b"]))
    assert left.tolist() == [False, False, True]
    assert [[*rule.values()] for rule in flow] == [["first", 2, 1, 1], ["second", 0, 1, 1]]
    with pytest.raises(InputError, match="table: of 3 candidates none is left: 3 out"):
        output.apply_rules(rules.assign(first=True), "table", pd.Series(["a", "b", "b"]))
