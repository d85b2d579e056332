"""Finished runs side by side: only those that were tested on the same patients."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from finished_runs import write_run
from medgemma_clinical.commands.several.compare import (
    join_predictions,
    read_predictions,
    run_compare,
)
from medgemma_clinical.evaluation.comparison import verdict_beside
from medgemma_clinical.files import InputError, file_hash
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE


def test_predictions_are_read_with_ids_and_patients_as_text(tmp_path: Path) -> None:
    table = read_predictions(write_run(tmp_path / "run"), "model")
    assert list(table) == ["id", "patient", "label", "model", "last value"]
    assert table["id"].tolist()[:2] == ["000", "001"]
    assert table["patient"].tolist()[:3] == ["NA", "NA", "p1"]


def test_joined_runs_keep_the_baselines_of_the_first(tmp_path: Path) -> None:
    folders = {name: write_run(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))}
    joined = join_predictions(folders)
    assert list(joined) == ["id", "patient", "label", "a", "b", "last value"]
    first = pd.read_csv(folders["a"] / "predictions_test.csv")
    assert joined["last value"].tolist() == first["last value"].tolist()
    assert joined["b"].tolist() != joined["a"].tolist()


def test_the_table_shows_each_run_and_its_difference_to_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [write_run(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))]
    with caplog.at_level(logging.INFO):
        assert run_compare(runs, seed=0, fewest=0) == 0
    assert "minus a [95 %]" in caplog.text
    assert str(tmp_path) not in caplog.text
    for run in runs:
        table = pd.read_csv(run / "predictions_test.csv")
        score = roc_auc_score(table["label"], table["probability"])
        (row,) = [x for x in caplog.text.splitlines() if x.strip().startswith(f"{run.name} ")]
        assert f"{score:.3f} [" in row
    assert "last value" in caplog.text
    assert "60 rows, 20 events" in caplog.text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda table: table.assign(id=table["id"] + "x"), "different patients"),
        (lambda table: table.assign(label=1 - table["label"]), "other labels"),
        (lambda table: table.iloc[1:], "different patients"),
        (lambda table: table.drop(columns="patient"), "no test predictions"),
        (lambda table: table.drop(columns="probability"), "no test predictions"),
        (None, "no test predictions"),
    ],
    ids=["other ids", "other labels", "fewer rows", "no patient", "no probability", "no file"],
)
def test_runs_that_were_not_tested_alike_are_refused(
    tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame] | None, problem: str
) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    path = runs[1] / "predictions_test.csv"
    table = pd.read_csv(path, dtype={"id": str}, keep_default_na=False)
    if change is None:
        path.unlink()
    else:
        change(table).to_csv(path, index=False)
    with pytest.raises(InputError, match=problem):
        run_compare(runs, seed=0, fewest=0)


@pytest.mark.parametrize("named", [True, False])
def test_rows_known_by_number_are_compared_on_the_same_data_only(
    tmp_path: Path, named: bool
) -> None:
    data = {"named": named}
    one = write_run(tmp_path / "a", data=data)
    same = write_run(tmp_path / "b", data=data)
    other = write_run(tmp_path / "c", data={**data, "rows_sha256": "other"})
    assert run_compare([one, same], seed=0, fewest=0) == 0
    if named:
        assert run_compare([one, other], seed=0, fewest=0) == 0
    else:
        with pytest.raises(InputError, match="their data name no patients"):
            run_compare([one, other], seed=0, fewest=0)


def test_a_stage_1_that_was_trained_anew_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside the later stage, or among the compared ones in another folder."""
    for place in ("old", "new"):
        write_run(tmp_path / place / "trajectory")
        (tmp_path / place / TRAJECTORY_FILE).write_text(place)
    digests = {place: file_hash(tmp_path / place / TRAJECTORY_FILE) for place in ("old", "new")}
    built = write_run(tmp_path / "old" / "classification", 1, stage_1=digests["old"])
    alone = write_run(tmp_path / "old" / "generative", 2)

    def warned(*runs: Path) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert run_compare(list(runs), seed=0, fewest=0) == 0
        return caplog.messages

    assert warned(tmp_path / "old" / "trajectory", built) == []
    assert warned(built, alone) == []
    (line,) = warned(tmp_path / "new" / "trajectory", built)
    assert line.startswith(
        "warning: old/classification reads another stage 1 than new/trajectory, which was trained "
        "anew since"
    )
    (tmp_path / "old" / TRAJECTORY_FILE).write_text("trained anew")
    for runs in ((built, alone), (tmp_path / "old" / "trajectory", built)):
        (line,) = warned(*runs)
        assert f"classification reads another stage 1 than the {TRAJECTORY_FILE} beside it" in line
    (tmp_path / "old" / TRAJECTORY_FILE).unlink()
    assert warned(built, alone) == []


def test_two_different_folders_are_needed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    for runs in ([run], [run, tmp_path / "x" / ".." / "a"]):
        with pytest.raises(InputError, match="two different folders"):
            run_compare(runs, seed=0, fewest=0)


def test_a_page_is_written_where_its_place_is_named_and_nowhere_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [write_run(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))]
    run_compare(runs, seed=0, fewest=0)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    (runs[1] / "run.json").unlink()
    runs.append(write_run(tmp_path / "c", 2))
    (runs[2] / "history.jsonl").write_text("[")
    with caplog.at_level(logging.INFO):
        run_compare(runs, seed=0, fewest=0, output_dir=tmp_path / "x" / "y")
    names = {path.name for path in (tmp_path / "x" / "y").iterdir()}
    assert names == {"compare.json", "compare.png", "compare.html"}
    page = (tmp_path / "x" / "y" / "compare.html").read_text()
    assert "<title>3 finished models on the same test patients</title>" in page
    assert str(tmp_path) not in page
    results = json.loads((tmp_path / "x" / "y" / "compare.json").read_text())
    assert results["a"]["tokens"] == 12.0
    for name in ("b", "c"):  # a copy without run.json, a damaged history
        assert "tokens" not in results[name]
    verdict = verdict_beside(results["last value"])
    (row,) = [x for x in caplog.text.splitlines() if x.strip().startswith("last value ")][-1:]
    assert f" {verdict} " in row
    assert f"</span>&nbsp;{verdict.words}</span>" in page
