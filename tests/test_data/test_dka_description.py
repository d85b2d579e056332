"""Tests of the description beside a DKA file, and of the names of its columns."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.dka.description import Description, list_columns, list_unread
from medgemma_clinical.data.scoring import Findings
from medgemma_clinical.files import InputError, file_hash
from trajectories import table_of


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "null",
        "3",
        "\xff",
    ],
)
def test_a_broken_description_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.with_suffix(".json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"data\.json: not a description of data\.csv"):
        Description.beside(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"series": 5}', "series: give a text"),
        ('{"question": ""}', "question: give a text"),
        ('{"csv_sha256": 5}', "csv_sha256: give a text"),
        ('{"series": "Lactate"}', "series: give unit beside it, empty where there is none"),
        ('{"plausible": ["a", "b"]}', "plausible: give two rising numbers, as"),
        ('{"plausible": 3}', "plausible: give two"),
        ('{"plausible": [60, 3]}', "plausible: give two"),
        ('{"plausible": [0, 1, 2]}', "plausible: give two"),
        ('{"plausible": [0, Infinity]}', "plausible: give two"),
        ('{"plausible": [NaN, 1]}', "plausible: give two"),
        ('{"plausible": [false, true]}', "plausible: give two"),
        ('{"limits": {"x": [-1e999, 1]}}', "limits.x: give two"),
        ('{"limits": {"x": [0, 1%s]}}' % ("0" * 400), "limits.x: give two"),
        ('{"limits": [1, 2]}', "limits: give an object"),
        ('{"reference": 3}', "reference: give two rising numbers, as"),
        ('{"reference": [12, 3]}', "reference: give two"),
        ('{"reference": [3, 3]}', "reference: give two"),
        ('{"reference": [3]}', "reference: give two"),
        ('{"reference": [null]}', "reference: give two"),
        ('{"reference": [null, null]}', "reference: give two"),
        ('{"reference": [null, 3, 4]}', "reference: give two"),
        ('{"reference": [3, "4"]}', "reference: give two"),
        ('{"reference": [null, NaN]}', "reference: give two"),
        ('{"reference": [null, true]}', "reference: give two"),
        ('{"references": {"x": [2, 1]}}', "references.x: give two"),
        ('{"references": [1, 2]}', "references: give an object"),
        ('{"labels": ["label_death"]}', "labels: give an object"),
        ('{"labels": {"label_death": "x"}}', "labels.label_death: give an object"),
        ('{"labels": {"label_death": {"outcome": 3}}}', "labels.label_death.outcome: give a text"),
        ('{"flow": 3}', "flow: give a list of rules"),
        ('{"flow": [3]}', "flow: give a list"),
        ('{"flow": [{"rule": "a", "removed": 0}]}', "flow: give a list"),
        ('{"flow": [{"rule": "a", "removed": 0, "left": "abc"}]}', "flow: give a list"),
        ('{"flow": [{"rule": "a", "removed": -5, "left": 1}]}', "flow: give a list"),
        ('{"flow": [{"rule": "a", "removed": true, "left": 1%s}]}' % ("0" * 20), "flow: give"),
        ('{"unit": "a", "unit": "b"}', "unit: stands twice"),
        ('{"limits": {"x": [1, 2], "x": [1, 3]}}', "x: stands twice"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(InputError) as caught:
        Description.beside(tmp_path / "data.csv")
    assert str(caught.value).startswith(f"{tmp_path / 'data.json'}, key {problem}")


def test_the_default_description_is_the_anion_gap() -> None:
    assert (Description().series, Description().unit) == ("Anion gap", "mEq/L")


@pytest.mark.parametrize("limits", ["[1, 2]", '{"x": [2, 1]}'])
def test_limits_that_are_no_ranges_are_refused(limits: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(f'{{"limits": {limits}}}')
    with pytest.raises(InputError, match="limits"):
        Description.beside(tmp_path / "data.csv")


def test_the_description_of_a_file_in_capitals_is_found(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "DATA.CSV.GZ", "wt") as file:
        file.write(table_of(["24 (0h)"]).to_csv(index=False))
    (tmp_path / "DATA.json").write_text('{"series": "Gap", "unit": ""}')
    assert MIMICtrajectoryDataset(tmp_path / "DATA.CSV.GZ").features[0] == "Gap"


def test_a_description_beside_the_file_is_used_and_its_absence_means_the_default(
    tmp_path: Path,
) -> None:
    path = tmp_path / "data.csv"
    table_of(["24 (0h)", "20 (0h)"]).to_csv(path, index=False)
    assert MIMICtrajectoryDataset(path).description == Description()
    text = '{"series": "Lactate", "unit": "mmol/L", "plausible": [0, 30], "licence": "any"}'
    path.with_suffix(".json").write_text(text)
    dataset = MIMICtrajectoryDataset(path)
    assert dataset.description == Description("Lactate", "mmol/L", plausible=(0.0, 30.0))
    assert dataset.prompt(0) == "Lactate (mmol/L): 24 (0h). Will care have to be escalated?\n"
    assert (dataset.features, dataset.units) == (("Lactate",), ("mmol/L",))
    given = MIMICtrajectoryDataset(path, description=Description(outcome="Stroke"))
    assert given.outcome == "Stroke"


def test_a_time_scale_is_a_number_of_hours(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{"time_scale": 8760}')
    assert Description.beside(path).time_scale == 8760.0
    path.write_text("{}")
    assert Description.beside(path).time_scale is None
    for wrong in ("0", "-1", "NaN", "Infinity", f"1{400 * '0'}", "true", '"72"', "null", "[72]"):
        path.write_text(f'{{"time_scale": {wrong}}}')
        with pytest.raises(InputError, match="key time_scale: give hours, a number above 0"):
            Description.beside(path)


def test_a_description_of_another_file_brings_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, table = tmp_path / "data.csv", table_of(["24 (0h)"], subject_id="a")
    table.to_csv(path, index=False)
    path.with_suffix(".json").write_text(json.dumps({"csv_sha256": file_hash(path)}))
    assert MIMICtrajectoryDataset(path).warnings == ()
    table.assign(subject_id="b").to_csv(path, index=False)
    (text,) = MIMICtrajectoryDataset(path).warnings
    assert text == "data.json was made with another data.csv: check that it describes this one"
    assert caplog.messages == [f"warning: {path}: {text}"]
    config: dict[str, Any] = {"features": ["Anion gap"], "units": ["mEq/L"]}
    config |= {"outcome": "Escalation", "question": "?", "read_options": {"max_len": 20}}
    config["inputs"] = {"static": [], "prediction_time": False}
    findings = Findings(str(path), strict=False)
    assert list(MIMICtrajectoryDataset.scoring_rows(path, config, findings, 9))
    assert [*findings.warnings] == [text]


def test_keys_of_columns_that_the_file_lacks_are_warnings() -> None:
    description = Description(
        limits={"lactat": (0, 9), "lactate": (0, 9), "anion gap": (0, 9)},
        references={"ph": (7.35, None), "lactate": (None, 2)},
        labels={"label_deth": {"outcome": "Death"}, "label_icu": {}, "label_death": {}},
    )
    columns = {"trajectory_Lactate": ["1 (0h)"], "label_death": [1], "subject_id": ["a"]}
    dataset = MIMICtrajectoryDataset(table_of(["1 (0h)"], **columns), description=description)
    none = "of the JSON file: no such"
    assert dataset.warnings == (
        f"key limits.lactat {none} series beside the main one: did you mean lactate?",
        f"key limits.anion gap {none} series beside the main one",
        f"key references.ph {none} series beside the main one",
        f"key labels.label_deth {none} column: did you mean label_death?",
        f"key labels.label_icu {none} column",
    )


def test_another_series_has_no_limits_of_the_anion_gap(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{"series": "Lactate", "unit": "", "limits": {"x": null, "y": [1, 2]}}')
    description = Description.beside(path)
    assert (description.plausible, description.limits) == (None, {"y": (1, 2)})
    path.write_text("{}")
    assert Description.beside(path).plausible == (-5, 60)


def test_limits_are_found_whatever_the_spelling_of_the_series() -> None:
    description = Description(plausible=(0, 9), limits={"blood urea": (1, 2)})
    table = table_of(["1 (0h)"], trajectory_Blood_Urea=["1 (0h)"], trajectory_x=["1 (0h)"])
    dataset = MIMICtrajectoryDataset(table, description=description)
    assert [dataset.limits(f) for f in range(3)] == [(0, 9), (1, 2), None]
    dataset.features = ("anion GAP", *dataset.features[1:])  # as a checkpoint spells it
    assert dataset.limits(0) == dataset.plausible(0) == (0, 9)


def test_a_reference_range_has_two_ends_or_one(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{"reference": [3, 12], "references": {"Blood_Urea": [null, 8], "x": null}}')
    description = Description.beside(path)
    assert [description.reference] == [(3, 12)]
    assert description.references == {"blood urea": (None, 8)}
    table = table_of(["1 (0h)"], trajectory_blood_urea=["1 (0h)"], trajectory_x=["1 (0h)"])
    dataset = MIMICtrajectoryDataset(table, description=description)
    assert [dataset.reference(f) for f in range(3)] == [(3, 12), (None, 8), None]
    path.write_text("{}")
    assert Description.beside(path) == Description()


@pytest.mark.parametrize("first", ["98765", "24 (0h) -> 20 (2h)", " -3.5 ", "98765-a"])
def test_a_first_row_of_cells_is_not_listed(first: str) -> None:
    text = list_columns(["note", first])
    assert text == "the first row seems to hold data: is the header missing?"


def test_at_most_twenty_columns_are_listed() -> None:
    assert list_columns(["age", "label"]) == "the columns are age, label"
    assert list_columns([f"c{k}" for k in range(50)]).endswith("c19 and 30 more")


@pytest.mark.parametrize(
    ("content", "place", "problem"),
    [
        ({"series": "Gap\x1b]0;title\x07"}, "key series", r"not printable: Gap\x1b]0;title\x07"),
        ({"unit": "mEq/L\r"}, "key unit", r"not printable: mEq/L\r"),
        ({"question": "Will\u202e it?"}, "key question", r"Will\u202e it?"),
        ({"outcome": "Death\n2026 forged"}, "key outcome", r"Death\n2026 forged"),
        ({"prediction_time": "a\x00"}, "key prediction_time", r"a\x00"),
        ({"horizon": "\ud800"}, "key horizon", r"\ud800"),
        ({"limits": {"x\x1b[2J": [1, 2]}}, "key limits", r"x\x1b[2J"),
        ({"flow": [{"rule": "a\x9b", "removed": 1, "left": 2}]}, "key flow", r"a\x9b"),
        ({"series": "x" * 201}, "key series", "longer than 200 characters"),
        ({"question": "x" * 2_001}, "key question", "longer than 2,000 characters"),
        ({"references": {"x\x07": [1, 2]}}, "key references", r"x\x07"),
        ({"limits": {"x" * 201: [1, 2]}}, "key limits", "longer than 200 characters"),
        ({"outcome": "=HYPERLINK(1)"}, "key outcome", "a spreadsheet would take it for a formula"),
        ({"outcome": "+x"}, "key outcome", "formula"),
        ({"outcome": "-x"}, "key outcome", "formula"),
        ({"outcome": "@x"}, "key outcome", "formula"),
    ],
)
def test_a_text_that_could_forge_a_line_or_fill_the_log_is_refused_escaped(
    content: dict[str, object], place: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "data.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        Description.beside(tmp_path / "data.csv")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'data.json'}, {place}: ")
    assert problem in message
    assert message.isprintable()
    assert len(message) < 500


@pytest.mark.parametrize(
    "name",
    [
        "trajectory_a\x1b[2J",
        "trajectory_a [m\x07]",
        f"trajectory_{'a' * 201}",
        f"trajectory_a [{'b' * 201}]",
    ],
)
def test_a_column_that_could_forge_a_line_or_fill_the_log_is_refused_escaped(name: str) -> None:
    with pytest.raises(InputError, match=r"^DataFrame, row 1, column trajectory_a") as caught:
        MIMICtrajectoryDataset(table_of(["1 (0h)"], **{name: ["2 (0h)"]}))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500


def test_unread_columns_are_ten_names_at_most_and_no_cells() -> None:
    assert list_unread(["age", "sex"]) == "age, sex"
    assert list_unread([f"c{k}" for k in range(1_000)]).endswith("c9 and 990 more")
    text = list_unread(["24 (0h) -> 20 (2h)", "98765", "a\x1b[2J", "x" * 999])
    assert text == f"a\\x1b[2J, {'x' * 200} and 2 more"


def test_a_file_of_very_many_series_is_not_listed_whole(tmp_path: Path) -> None:
    many = {f"trajectory_s{k}": ["1 (0h)"] for k in range(500)}
    with pytest.raises(InputError, match=r"no such series among: .* and 481 more"):
        MIMICtrajectoryDataset(table_of(["1 (0h)"], **many), series=["none"])


@pytest.mark.parametrize("target", ["missing", "/dev/zero"])
def test_a_description_that_is_no_file_is_not_passed_over(target: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").symlink_to(target)
    with pytest.raises(InputError, match=r"data\.json: not a file"):
        Description.beside(tmp_path / "data.csv")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"serie": "Lactate"}, "key serie: no such key: did you mean series?"),
        ({"Outcome": "Death"}, "key Outcome: no such key: did you mean outcome?"),
        ({"zzz": 1}, "key zzz: no such key: the keys are series, unit, question"),
        ({"a\x1b[2J": 1}, r"key a\x1b[2J: no such key"),
        (
            {"labels": {"label_death": {"outcom": "x"}}},
            "labels.label_death.outcom: no such key: did",
        ),
        (
            {"labels": {"label_death": {"outcome": "=x"}}},
            "key labels.label_death.outcome: a spreads",
        ),
    ],
)
def test_a_key_that_nothing_reads_is_refused(content: object, problem: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        Description.beside(tmp_path / "data.csv")
    assert problem in str(caught.value)


def test_keys_of_origin_are_known(tmp_path: Path) -> None:
    keys = ("made_by", "rows", "values", "definitions", "arguments", "source", "tables_sha256")
    content = {key: {"any": 1} for key in (*keys, "versions", "licence")}
    (tmp_path / "data.json").write_text(json.dumps(content))
    assert Description.beside(tmp_path / "data.csv") == Description()


def test_another_label_is_never_called_by_the_outcome_of_label_escalation() -> None:
    description = Description(
        outcome="ICU", question="ICU?", horizon="24 h", labels={"b": {"outcome": "B"}}
    )
    assert description.for_label("label_escalation") == description
    death = description.for_label("label_death")
    assert (death.outcome, death.question) == ("Death", "Will the outcome Death occur?")
    assert death.horizon == ""
    both = description.for_label("b")
    assert (both.outcome, both.question) == ("B", "Will the outcome B occur?")
    assert both.horizon == "24 h"
    assert description.for_label("label_ICU_stay").outcome == "ICU stay"
    assert description.for_label("label_").outcome == "Label_"
    entry = replace(description, labels={"label_death": {"outcome": "Died", "question": "Dies?"}})
    assert entry.for_label("label_death").question == "Dies?"
    for name in ("=cmd", "a\x1b[2J", "x" * 201):
        with pytest.raises(InputError, match="--label_column"):
            description.for_label(name)


def test_a_series_of_unknown_limits_is_judged_by_its_own_quartiles(tmp_path: Path) -> None:
    """As that of an event table: the limits of an anion gap would call it implausible."""
    cells = [f"{900 + k} (0h) -> {905 + k} (1h)" for k in range(12)]
    table = pd.DataFrame({"clinical_trajectory": cells, "label_escalation": [0, 1] * 6})
    path = tmp_path / "data.csv"
    table.to_csv(path, index=False)
    path.with_suffix(".json").write_text('{"series": "Platelets", "unit": "", "plausible": null}')
    low, high = MIMICtrajectoryDataset(path).plausible(0)
    assert -5 < low < 900 < 920 < high
