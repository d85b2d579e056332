"""``--predict``: its flags, the place of its output, stops, and figures on labelled rows."""

from __future__ import annotations

import gzip
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import medgemma_trainer as trainer
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.commands import predict, predict_rows
from medgemma_clinical.commands.predict import check_flags, check_output, find_source, given_only
from medgemma_clinical.evaluation.cohort import Cohort, cohort_figures
from medgemma_clinical.files import InputError
from medgemma_clinical.models.trained_model import read_trained_config
from predicting import SERIES, command, predicted, read_predictions, refused, write_data
from srtr_dataset import SRTRTrajectoryDataset

CHECKPOINT = {"--checkpoint", "--predictions"}


# --------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"--max_len", *CHECKPOINT}, ["no use for --max_len"]),
        ({"--series", "--epochs", *CHECKPOINT}, ["no use for --epochs, --series"]),
        ({"--predictions"}, ["needs --checkpoint", "stage folder"]),
        ({"--checkpoint"}, ["needs --predictions", "CSV"]),
        # All that is wrong is said at once: the way out of a wrong flag is the missing one.
        ({"--output_dir", "--checkpoint"}, ["no use for --output_dir", "missing: --predictions"]),
    ],
)
def test_flags_of_training_and_missing_ones_are_refused(
    given: set[str], expected: list[str]
) -> None:
    with pytest.raises(InputError) as error:
        check_flags({"--predict", *given})
    assert all(text in str(error.value) for text in expected)


def test_defaults_of_training_are_not_taken_for_the_users_choice() -> None:
    args = Namespace(**{flag.removeprefix("--"): 1 for flag in predict.PREDICT_FLAGS}, epochs=10)
    kept = given_only(args, {"--predict", "--batch_size"})
    assert (kept.batch_size, kept.seed, kept.epochs) == (1, 1, 10)
    assert (kept.organ, kept.dataset, kept.precision, kept.data_path) == (None,) * 4


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        ("srtr", {"organ": "kidney", "data_dir": Path("d")}, ["--organ kidney", "on liver"]),
        ("srtr", {"dataset": "dka", "data_dir": Path("d")}, ["--dataset dka", "on srtr"]),
        ("srtr", {"data_path": Path("x.csv")}, ["--data_path", "srtr", "--data_dir"]),
        ("dka", {"data_dir": Path("d")}, ["--data_dir", "dka", "--data_path"]),
        ("dka", {"organ": "liver", "data_path": Path("x.csv")}, ["--organ liver", "on dka"]),
        ("dka", {}, ["needs --data_path", "dka"]),
        ("srtr", {}, ["needs --data_dir", "srtr"]),
    ],
)
def test_data_of_another_kind_than_the_checkpoints_are_refused(
    kind: str, flags: dict[str, Any], expected: list[str]
) -> None:
    reading = {"srtr": {"organ": "liver"}, "dka": {}}[kind]
    dataset = {"srtr": SRTRTrajectoryDataset, "dka": MIMICtrajectoryDataset}[kind]
    names = ("dataset", "organ", "data_path", "data_dir")
    request = Namespace(**{**dict.fromkeys(names), **flags})
    with pytest.raises(InputError) as error:
        find_source(request, {"dataset": kind, "reading": reading}, dataset)
    assert all(text in str(error.value) for text in expected)


@pytest.mark.parametrize("flag", ["--checkpoint x", "--predictions x", "--strict"])
def test_training_refuses_flags_of_predict(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--trajectory_only", "--data_path", str(tmp_path / "x.csv"), *flag.split()]
    assert refused(capsys, words, flag.split()[0], "--predict")


def test_only_flags_that_matter_are_asked_for_by_the_command(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    words = command(runs / "trajectory", runs / "train.csv", out, "--solver", "rk4")
    assert refused(capsys, words, "--predict has no use for --solver", out=out)


# --------------------------------------------------------------------------- the output


def place_input(out: Path) -> tuple[Path, Path]:
    """Name the input as the output."""
    out.write_text("id,probability,prediction\n")
    return out, out.parent / "kept.pt"


def place_within(out: Path) -> tuple[Path, Path]:
    """Put the output into the checkpoint's folder."""
    return out.parent / "rows.csv", out.parent


def place_run(out: Path) -> tuple[Path, Path]:
    """Put the output into a run's folder."""
    (out.parent / "metrics.json").write_text("{}")
    return out.parent / "rows.csv", out.parent / "kept.pt"


def place_other(out: Path) -> tuple[Path, Path]:
    """Put a table of another kind where the output goes."""
    out.write_text("id,label\n1,0\n")
    return out.parent / "rows.csv", out.parent / "kept.pt"


def place_page(out: Path) -> tuple[Path, Path]:
    """Put someone else's page where the report goes."""
    out.with_suffix(".report.html").write_text("<p>someone else's</p>")
    return out.parent / "rows.csv", out.parent / "kept.pt"


def place_folder(out: Path) -> tuple[Path, Path]:
    """Put a folder where the report goes."""
    out.with_suffix(".report.html").mkdir()
    return out.parent / "rows.csv", out.parent / "kept.pt"


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        (place_input, "the file to read"),
        (place_within, "lies within"),
        (place_run, "a run's own folder"),
        (place_other, "no file of predictions"),
        (place_page, "out.report.html"),
        (place_folder, "which is a folder"),
    ],
)
def test_nothing_of_another_origin_is_written_over(
    place: Callable[[Path], tuple[Path, Path]], problem: str, tmp_path: Path
) -> None:
    out = tmp_path / "place" / "out.csv"
    out.parent.mkdir()
    source, checkpoint = place(out)
    with pytest.raises(InputError, match=problem):
        check_output(out, source, checkpoint)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("kept.pt", "the name of a .csv file"),
        ("rows.json", "the name of a .csv file"),
        ("folder.csv", "a folder that exists"),
        ("missing/out.csv", "a folder that exists"),
    ],
)
def test_the_output_is_a_csv_in_a_folder_that_exists(
    name: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=problem):
        check_output(tmp_path / name, tmp_path / "rows.csv", tmp_path / "kept.pt")


def test_earlier_predictions_and_their_report_are_replaced(
    runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    data, out = write_data(table.head(9), tmp_path / "rows.csv"), tmp_path / "new.csv"
    first = predicted(runs / "trajectory", data, out)
    pd.testing.assert_frame_equal(predicted(runs / "trajectory", data, out), first)


def test_an_existing_output_stays_when_the_run_fails(
    runs: Path, table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "TRAJECTORY_ROWS", 4)
    few = table.head(20).copy()
    few.loc[15, SERIES] = "oops"
    data, out = write_data(few, tmp_path / "bad.csv"), tmp_path / "out.csv"
    earlier = "id,probability,prediction,problem\n1,0.5,0,\n"
    out.write_text(earlier)
    assert trainer.main(command(runs / "trajectory", data, out, "--strict")) == 2
    cut = tmp_path / "bad.csv.gz"
    cut.write_bytes(gzip.compress(data.read_bytes())[:-40])
    assert trainer.main(command(runs / "trajectory", cut, out)) == 2
    assert out.read_text() == earlier

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict_rows.PredictionTally, "add", interrupted)
        assert trainer.main(command(runs / "trajectory", data, out)) == 130
    assert out.read_text() == earlier
    visible = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")}
    assert visible == {"bad.csv", "bad.csv.gz", "bad.json", "out.csv"}
    assert trainer.main(command(runs / "trajectory", data, out)) == 0
    assert out.read_text() != earlier


@pytest.mark.parametrize(
    ("moment", "expected"), [("load_trained_model", 0), ("score_rows", 2), ("remove", 2)]
)
def test_two_runs_do_not_write_one_file(
    moment: str,
    expected: int,
    runs: Path,
    table: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whenever the second one starts while the first one writes."""
    monkeypatch.setattr(predict, "TRAJECTORY_ROWS", 7)
    data, out = write_data(table.head(20), tmp_path / "few.csv"), tmp_path / "out.csv"
    words = command(runs / "trajectory", data, out)
    assert trainer.main(words) == 0
    written, real, codes = out.read_text(), getattr(predict, moment), []

    def meanwhile(*given: Any) -> Any:
        monkeypatch.setattr(predict, moment, real)
        codes.append(trainer.main(words))
        return real(*given)

    out.unlink()
    monkeypatch.setattr(predict, moment, meanwhile)
    assert trainer.main(words) == 0
    assert codes == [expected]
    assert out.read_text() == written
    assert not list(tmp_path.glob("*.partial"))


def test_what_a_dead_run_left_is_no_hindrance(
    runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    data, out = write_data(table.head(20), tmp_path / "few.csv"), tmp_path / "out.csv"
    for name in (".out.csv.lock", ".out.csv.partial"):
        (tmp_path / name).write_text("left")
    assert trainer.main(command(runs / "trajectory", data, out)) == 0
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_file_without_rows_is_refused(
    ending: str,
    runs: Path,
    table: pd.DataFrame,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    out, data = tmp_path / "out.csv", write_data(table.head(0), tmp_path / f"empty.{ending}")
    assert refused(capsys, command(runs / "trajectory", data, out), "no rows", out=out)


# --------------------------------------------------------------------------- labelled rows


def test_figures_are_those_of_the_labelled_rows(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = table.copy()
    mixed.loc[::3, "label_escalation"] = ""
    bad = mixed.index[1]
    mixed.loc[bad, SERIES] = "oops"
    out = tmp_path / "out.csv"
    lines = predicted(runs / "trajectory", write_data(mixed, tmp_path / "mixed.csv"), out)
    known = (mixed["label_escalation"] != "") & lines["probability"].notna()
    labels = mixed.loc[known, "label_escalation"].astype(int)
    score = roc_auc_score(labels, lines.loc[known, "probability"])
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        f"rows with a label: {int(known.sum())} events: {labels.sum()} AUROC: {score:.3f} ["
        in shown
    )
    page = out.with_suffix(".report.html").read_text()
    config = read_trained_config(runs / "trajectory")
    assert f"{100 * config['decision']['threshold']:.3g} %" in page
    assert f"AUROC {score:.3f} [" in page
    assert "Case mix" in page
    (row,) = re.findall(r"<tr>\s*<th[^>]*>Rows</th>(.*?)</tr>", page, re.DOTALL)
    expected = [f"{config['case_mix']['rows']:,.0f}", f"{int(known.sum()):,}"]
    assert expected == re.findall(r"<td>\s*(.*?)\s*</td>", row, re.DOTALL)
    assert f"{int(known.sum()):,}, judged here" in page
    assert not any(f">{i}<" in page for i in mixed["id"]), "no id of a patient"
    few = write_data(table.head(3).assign(label_escalation="0"), tmp_path / "few.csv")
    predicted(runs / "trajectory", few, out)
    assert "one class only" in capsys.readouterr().out
    assert not out.with_suffix(".report.html").exists(), "the report of other predictions"


def test_figures_of_many_chunks_are_those_of_one(
    runs: Path, table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = table.copy()
    rows["subject_id"] = [f"p{k % 17}" for k in range(len(rows))]  # a patient in many chunks
    data = write_data(rows, tmp_path / "rows.csv")
    judged: list[tuple[Cohort, dict[str, float]]] = []
    collect = predict_rows.PredictionTally.cohort

    def kept(self: predict_rows.PredictionTally) -> tuple[Cohort, dict[str, float]]:
        judged.append(collect(self))
        return judged[-1]

    monkeypatch.setattr(predict_rows.PredictionTally, "cohort", kept)
    for name, size in (("one", 10_000), ("many", 7)):
        monkeypatch.setattr(predict, "TRAJECTORY_ROWS", size)
        predicted(runs / "trajectory", data, tmp_path / f"{name}.csv")
    (one, mix), (many, same_mix) = judged
    assert mix == same_mix
    assert mix["patients"] == 17
    np.testing.assert_array_equal(one.labels, many.labels)
    np.testing.assert_array_equal(one.groups, many.groups)
    np.testing.assert_allclose(one.probability, many.probability, atol=1e-6)
    pd.testing.assert_frame_equal(one.subgroups, many.subgroups)
    out = read_predictions(tmp_path / "many.csv")
    np.testing.assert_array_equal(many.probability, out["probability"])
    figures = cohort_figures(many, 0.5, seed=0)
    page = (tmp_path / "many.report.html").read_text()
    assert f"AUROC {figures.auroc.text()}" in page


def test_a_run_that_was_not_finished_has_no_threshold(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    whole = torch.load(runs / "medgemma_trajectory_best.pt", weights_only=True)
    del whole["config"]["decision"]
    torch.save(whole, tmp_path / "early.pt")
    data = write_data(table.head(9), tmp_path / "rows.csv")
    out = predicted(tmp_path / "early.pt", data, tmp_path / "new.csv")
    assert "the checkpoint has no threshold" in capsys.readouterr().out
    assert (out["prediction"] == (out["probability"] >= 0.5)).all()
    predicted(runs / "trajectory", data, tmp_path / "new.csv")
    assert "has no threshold" not in capsys.readouterr().out


def test_an_interrupted_report_leaves_the_predictions_and_no_page_of_others(
    runs: Path,
    table: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = write_data(table, tmp_path / "new.csv"), tmp_path / "out.csv"
    predicted(runs / "trajectory", data, out)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "write_report", interrupted)
    capsys.readouterr()
    assert trainer.main(command(runs / "trajectory", data, out)) == 130
    assert "the predictions are written, their figures are not" in capsys.readouterr().err
    assert len(pd.read_csv(out)) == len(table)
    assert not out.with_suffix(".report.html").exists(), "the page of other predictions"
