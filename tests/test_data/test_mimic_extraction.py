"""From MIMIC-IV to files: what may be requested, where it may be written, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from medgemma_clinical.data.mimic.extraction import (
    OUTCOMES,
    Extraction,
    check_target,
    extract,
    write_rows,
)
from medgemma_clinical.files import InputError
from mimic_files import Mini

ROWS = pd.DataFrame({"subject_id": [1], "clinical_trajectory": ["20 (0h)"]})
MADE: dict[str, Any] = {"made_by": "a test", "series": "Anion gap"}


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        ({"window_hours": 0.0}, "--window_hours 0"),
        ({"window_hours": float("nan")}, "--window_hours nan"),
        ({"horizon_hours": -1.0}, "--horizon_hours -1"),
        ({"horizon_hours": 2e6}, "--horizon_hours"),
        ({"min_observations": 0}, "--min_observations 0"),
        ({"cohort": "none"}, "--cohort none: must be one of dka, all, biochemical"),
        ({"compute_gap": "never"}, "--compute_gap never"),
        ({"outcome": ("sepsis",)}, "--outcome sepsis"),
        ({"outcome": ()}, "--outcome"),
    ],
)
def test_an_impossible_request_is_refused_with_its_flag(
    request_: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=problem):
        Extraction(tmp_path, tmp_path / "out.csv", **request_)


def test_the_texts_of_several_outcomes_are_joined(tmp_path: Path) -> None:
    chosen = Extraction(tmp_path, tmp_path, outcome=("death", "icu")).outcome_text
    assert chosen.outcome == "In-hospital death or ICU admission"
    assert Extraction(tmp_path, tmp_path).outcome_text.outcome == "Escalation"


def target(out: Path) -> None:
    check_target(Extraction(out.parent, out))


@pytest.mark.parametrize(
    ("name", "problem"),
    [("out.txt", "must end in .csv"), ("no/such/out.csv", "no folder")],
)
def test_a_place_that_cannot_be_written_is_refused(name: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=problem):
        target(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody may write to")
def test_a_folder_without_the_right_to_write_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be written to"):
        target(Path("/proc/out.csv"))


def test_files_of_another_origin_are_not_replaced(tmp_path: Path) -> None:
    for name in ("a.csv", "b.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(InputError, match="choose another name"):
            target((tmp_path / name).with_suffix(".csv"))
    write_rows(ROWS, MADE, tmp_path / "c.csv")
    target(tmp_path / "c.csv")
    target(tmp_path / "new.csv")


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
    folder = Mini().admit(1).settling(1).write(tmp_path / "mimic")
    request = Extraction(folder, tmp_path / "out.csv", cohort="all")
    rows, description = extract(request, 1)
    write_rows(rows, description, request.out)
    text = request.out.with_suffix(".json").read_text()
    assert str(tmp_path) not in text
    written = json.loads(text)
    assert written["rows"] == {"rows": 1, "patients": 1, "events": 0, "computed_gaps": 0}
    assert written["arguments"]["outcome"] == list(OUTCOMES)
    columns = ["subject_id", "hadm_id", "clinical_trajectory", "clinical_context"]
    columns += ["label_escalation", *(f"label_{name}" for name in OUTCOMES)]
    assert list(pd.read_csv(request.out).columns) == columns
