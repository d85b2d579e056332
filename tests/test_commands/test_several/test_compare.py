"""Finished runs side by side: only those that were tested on the same patients."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from finished_runs import write_run
from medgemma_clinical.commands import run_folder
from medgemma_clinical.commands.several.compare import (
    join_predictions,
    model_names,
    read_predictions,
    run_compare,
)
from medgemma_clinical.evaluation.baselines import STAGE_1
from medgemma_clinical.evaluation.bootstrap import NO_VALUE
from medgemma_clinical.evaluation.comparison import (
    comparison_table,
    judged_models,
    verdict_beside,
)
from medgemma_clinical.evaluation.report import STAGE_NAMES
from medgemma_clinical.files import InputError, file_hash
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.language_model import TINY
from medgemma_clinical.models.sharing.model_card import RANDOM_MODEL
from pages import Page


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
    (row,) = [line for line in caplog.text.splitlines() if line.strip().startswith("a ")]
    assert " the reference " in row
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
        "warning: The model old/classification reads another stage 1 than new/trajectory, which "
        "was trained anew since"
    )
    (tmp_path / "old" / TRAJECTORY_FILE).write_text("trained anew")
    for runs in ((built, alone), (tmp_path / "old" / "trajectory", built)):
        (line,) = warned(*runs)
        assert f"stage 2 (classification) reads another stage 1 than the {TRAJECTORY_FILE}" in line
    (tmp_path / "old" / TRAJECTORY_FILE).unlink()
    assert warned(built, alone) == []


def test_a_stage_with_another_stage_1_has_no_verdict_and_the_warning_stands_first(
    tmp_path: Path,
) -> None:
    runs = finish_stages(tmp_path / "a", 0)
    (tmp_path / "a" / TRAJECTORY_FILE).write_text("trained anew")
    first, second, third = STAGE_NAMES.values()
    for reference, judged in (("trajectory", set()), ("classification", {f"other {first}"})):
        order = sorted(runs.values(), key=lambda run: run.name != reference)
        run_compare(order, seed=0, fewest=0, output_dir=tmp_path)
        page = (tmp_path / "compare.html").read_text()
        results = json.loads((tmp_path / "compare.json").read_text())
        assert set(judged_models(results, STAGE_NAMES[reference])) == {"last value", *judged}
        box = page.split('<section class="verdict "')[1]
        assert box.split("<p>")[1].startswith(f"<strong>The model {second} reads another stage 1")
        text = Page(page).text
        assert "Cost:" not in text
        table = comparison_table(results, STAGE_NAMES[reference]).set_index("Model")["Verdict"]
        others = {first, second, third} - {STAGE_NAMES[reference]}
        assert set(table[list(others)]) == {NO_VALUE}
        for name in others:
            assert f"The model {name} is" not in text
            assert f"whether the model {name} is" not in text
        if reference == "trajectory":
            assert f"{second} and {third} apart" in text
        alt, _ = Page(page).images()[0]
        assert not any(f": {name}" in alt or f", {name}" in alt for name in others)


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
    assert "<title>3 finished models on the same test patients: Death</title>" in page
    assert str(tmp_path) not in page
    results = json.loads((tmp_path / "x" / "y" / "compare.json").read_text())
    assert results["a"]["tokens"] == 12.0
    for name in ("b", "c"):  # a copy without run.json, a damaged history
        assert "tokens" not in results[name]
    verdict = verdict_beside(results["last value"])
    (row,) = [x for x in caplog.text.splitlines() if x.strip().startswith("last value ")][-1:]
    assert f" {verdict} " in row
    assert f"</span>&nbsp;{verdict.words}</span>" in page


def test_stages_of_one_folder_are_called_by_their_names_and_others_by_their_folders(
    tmp_path: Path,
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    runs = [old / name for name in ("trajectory", "classification", "generative", "copy")]
    words = ["stage 1 (trajectory alone)", "stage 2 (classification)", "stage 3 (written reports)"]
    assert model_names(runs) == [*words, "copy"]
    assert model_names([runs[1], new / "trajectory"]) == ["old/classification", "new/trajectory"]
    assert model_names([runs[0], old / "a" / "b"]) == ["trajectory", "a/b"]


def finish_stages(folder: Path, seed: int) -> dict[str, Path]:
    """Write three finished stages, the earlier ones among the baselines, and stage 1's file."""
    folder.mkdir()
    (folder / TRAJECTORY_FILE).write_text(f"of seed {seed}")
    digest = file_hash(folder / TRAJECTORY_FILE)
    runs, earlier = {}, pd.DataFrame()
    for k, stage in enumerate(STAGE_NAMES):
        built = None if stage == "trajectory" else digest
        runs[stage] = write_run(folder / stage, 10 * seed + k, stage_1=built)
        path = runs[stage] / "predictions_test.csv"
        table = pd.read_csv(path, dtype={"id": str}, keep_default_na=False)
        pd.concat([table, earlier], axis=1).to_csv(path, index=False)
        earlier[STAGE_NAMES[stage]] = table["probability"]
    return runs


def test_an_earlier_stage_is_left_out_only_where_it_is_compared_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another folder, or trained anew in the same one, it is another model."""
    one, other = (finish_stages(tmp_path / place, seed) for seed, place in enumerate("ab"))

    def compared(*runs: Path) -> list[str]:
        assert run_compare(list(runs), seed=0, fewest=0, output_dir=tmp_path / "out") == 0
        return list(json.loads((tmp_path / "out" / "compare.json").read_text()))

    second, third = STAGE_NAMES["classification"], STAGE_NAMES["generative"]
    later = [one[stage] for stage in ("generative", "classification", "trajectory")]
    assert compared(*later) == [third, second, STAGE_1, "last value"]
    monkeypatch.chdir(later[0])
    assert compared(Path(), *(Path("..", run.name) for run in later[1:]))[:2] == [third, second]
    names = ["a/classification", "b/trajectory", "last value", STAGE_1]
    assert compared(one["classification"], other["trajectory"]) == names
    page = Page((tmp_path / "out" / "compare.html").read_text()).text
    assert f"{STAGE_1} the one in the report of a/classification" in page
    names = ["a/generative", "b/classification", "last value", STAGE_1, second]
    assert compared(one["generative"], other["classification"]) == names
    shutil.copytree(one["trajectory"], tmp_path / "c" / "trajectory")
    shutil.copy(tmp_path / "a" / TRAJECTORY_FILE, tmp_path / "c")
    copied = compared(one["classification"], tmp_path / "c" / "trajectory")
    assert copied == ["a/classification", "c/trajectory", "last value"]
    (tmp_path / "a" / TRAJECTORY_FILE).write_text("trained anew")
    anew = compared(one["classification"], one["trajectory"])
    assert anew == [second, STAGE_1, "last value", f"other {STAGE_1}"]


def test_the_page_has_a_finding_on_each_run_and_the_banner_of_the_random_model(
    tmp_path: Path,
) -> None:
    """Stage 1 is one of the baselines of stage 2, and a model of its own here."""
    names = ("classification", "trajectory", "generative")
    (tmp_path / TRAJECTORY_FILE).write_text("stage 1")
    built = file_hash(tmp_path / TRAJECTORY_FILE)
    runs = [write_run(tmp_path / name, k, stage_1=built) for k, name in enumerate(names)]
    path = runs[0] / "predictions_test.csv"
    table = pd.read_csv(path, dtype={"id": str}, keep_default_na=False)
    table.assign(**{STAGE_1: 1 - table["probability"]}).to_csv(path, index=False)
    shutil.copy(path, runs[2] / path.name)
    run_compare(runs, seed=0, fewest=0, output_dir=tmp_path)
    page = Page((tmp_path / "compare.html").read_text()).text
    reference = STAGE_NAMES["classification"]
    results = json.loads((tmp_path / "compare.json").read_text())
    assert list(results) == [*(STAGE_NAMES[name] for name in names), "last value"]
    own = pd.read_csv(runs[1] / path.name)
    score = roc_auc_score(own["label"], own["probability"])
    assert results[STAGE_1]["auroc"]["value"] == pytest.approx(score)
    sentence = verdict_beside(results[STAGE_1]).sentence(f"the model {STAGE_1} is", reference)
    assert f"T{sentence[1:]}. Its AUROC is {score:.3f} [" in page
    assert f"The model stage 3 (written reports) is the same as {reference}." in page
    assert RANDOM_MODEL not in page
    run = run_folder.read_run(runs[1])
    assert run is not None
    tiny = {"model_name": TINY, "trajectory_only": False}
    run_folder.write_run(runs[1], {**run, "arguments": tiny})
    run_compare(runs, seed=0, fewest=0, output_dir=tmp_path)
    page = Page((tmp_path / "compare.html").read_text()).text
    assert f"The language model of {STAGE_1} is tiny and random" in page
    assert RANDOM_MODEL not in page, "the arguments of the others are not known"
