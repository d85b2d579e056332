"""The DKA file of a command: where it may be written, whole or not at all."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from medgemma_clinical.data.database.flags import TableRequest
from medgemma_clinical.data.database.output import apply_rules, check_target, make_file, write_rows
from medgemma_clinical.data.mimic.extraction import extract
from medgemma_clinical.data.mimic.request import Extraction
from medgemma_clinical.files import InputError
from mimic_files import Mini

ROWS = pd.DataFrame({"subject_id": [1], "clinical_trajectory": ["20 (0h)"]})
MADE: dict[str, Any] = {"made_by": "a test", "series": "Anion gap"}


@pytest.mark.parametrize(
    ("name", "problem"),
    [("out.txt", "must end in .csv"), ("no/such/out.csv", "no folder")],
)
def test_a_place_that_cannot_be_written_is_refused(name: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=problem):
        check_target(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody may write to")
def test_a_folder_without_the_right_to_write_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be written to"):
        check_target(Path("/proc/out.csv"))


def test_files_of_another_origin_are_not_replaced(tmp_path: Path) -> None:
    for name in ("a.csv", "b.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(InputError, match="choose another name"):
            check_target((tmp_path / name).with_suffix(".csv"))
    write_rows(ROWS, MADE, tmp_path / "c.csv")
    check_target(tmp_path / "c.csv")
    check_target(tmp_path / "new.csv")


def test_both_files_are_written_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.csv"
    write_rows(ROWS, MADE, out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_rows(ROWS.assign(subject_id=2), MADE, out)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert before.keys() == {"out.csv", "out.json"}


def test_the_description_is_there_before_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table without its description would be read as another series."""
    renamed: list[str] = []
    rename = os.replace

    def noted(old: Path, new: Path) -> None:
        renamed.append(new.suffix)
        rename(old, new)

    monkeypatch.setattr(os, "replace", noted)
    write_rows(ROWS, MADE, tmp_path / "out.csv")
    assert renamed == [".json", ".csv"]


def test_the_description_names_the_rows_and_no_path_of_the_machine(tmp_path: Path) -> None:
    mini = Mini().admit(1).trio(1, 1, 140).trio(1, 4, 138).trio(1, 40, 129)
    folder = mini.write(tmp_path / "mimic")
    request = Extraction(mimic_dir=folder, out=tmp_path / "out.csv", cohort="all", threads=1)
    rows, description = extract(request)
    write_rows(rows, description, request.out)
    text = request.out.with_suffix(".json").read_text()
    assert str(tmp_path) not in text
    written = json.loads(text)
    counts = {"rows": 1, "patients": 1, "events": 0, "discharged_alive": 0, "computed_gaps": 1}
    assert written["rows"] == counts
    assert written["arguments"]["outcome"] == ["escalation"]
    assert not {"threads", "memory_limit", "out", "mimic_dir"} & written["arguments"].keys()
    assert list(pd.read_csv(request.out).columns) == [
        "subject_id",
        "hadm_id",
        "clinical_trajectory",
        "prediction_hours",
        "clinical_context",
        "static_age [years]",
        "static_sex_male",
        "label_escalation",
        "label_death",
        "label_icu",
        "label_unresolved",
    ]


def test_the_log_counts_rows_patients_and_events(tmp_path, caplog):
    request = TableRequest(out=tmp_path / "out.csv")
    counts = {"rows": 1200, "patients": 3, "events": 1}
    with caplog.at_level(logging.INFO):
        assert make_file(request, lambda _: (ROWS, {"rows": counts})) == 0
    assert caplog.messages[-1] == f"{request.out}: 1,200 rows of 3 patients, 1 events"


def test_each_candidate_is_removed_by_the_first_rule_that_applies() -> None:
    rules = pd.DataFrame({"first": [True, True, False], "second": [True, False, False]})
    left, flow = apply_rules(rules, "table")
    assert left.tolist() == [False, False, True]
    assert [(rule["removed"], rule["left"]) for rule in flow] == [(2, 1), (0, 1)]


def test_a_cohort_of_nobody_is_refused_with_its_flow():
    rules = pd.DataFrame({"few": [True] * 3 + [False] * 27, "many": [True] * 30})
    with pytest.raises(InputError, match="of 30 candidates none is left: 3 out, 27 left: few; 27"):
        apply_rules(rules, "table")
