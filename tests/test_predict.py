"""Predictions for new rows: equal to the run's own, in order, whole or absent, and private."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

import medgemma_trainer as trainer
from conftest import SAMPLE
from dataset_format import InputError
from srtr_dataset import SRTRTrajectoryDataset
from srtr_files import LISTED, candidate, filler, history_row, random_tables, write_folder

MARKER = "ZYXWMARKER"
STAGES = ("trajectory", "classification", "generative")
SERIES = "clinical_trajectory"
OWN = {"split", "label_escalation"}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """100 stays of the sample data, their ids apart from their patients, some out of time order."""
    table = pd.read_csv(SAMPLE, nrows=100, dtype=str)
    table.insert(1, "id", [f"row {k}" for k in range(len(table))])
    table.loc[5, SERIES] = " -> ".join(reversed(str(table.loc[5, SERIES]).split(" -> ")))
    return table


def write(table: pd.DataFrame, path: Path, **description: Any) -> Path:
    """Write a data file and the sample's description beside it, or another."""
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False)
    words = {**json.loads(SAMPLE.with_suffix(".json").read_text()), **description}
    beside = path.with_name(path.name.removesuffix(".gz")).with_suffix(".json")
    beside.write_text(json.dumps(words))
    return path


@pytest.fixture(scope="module")
def runs(table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each stage on the tiny model, made by the command line."""
    place = tmp_path_factory.mktemp("runs")
    data = write(table, place / "train.csv")
    small = ["--data_path", str(data), "--output_dir", str(place), "--log_file", "none"]
    small += ["--batch_size", "8", "--encoder_lr", "0.05"]
    assert trainer.main(["--trajectory_only", "--trajectory_epochs", "3", *small]) == 0
    small += ["--model_name", "tiny", "--epochs", "2", "--adapter_lr", "0.01"]
    small += ["--ode_checkpoint", str(place / trainer.TRAJECTORY_FILE)]
    for mode in STAGES[1:]:
        assert trainer.main(["--mode", mode, *small]) == 0
    return place


def words_of(checkpoint: Path, data: Path, out: Path, *more: str) -> list[str]:
    words = ["--predict", "--checkpoint", str(checkpoint), "--data_path", str(data)]
    return [*words, "--predictions", str(out), *more]


def predicted(checkpoint: Path, data: Path, out: Path, *more: str) -> pd.DataFrame:
    assert trainer.main(words_of(checkpoint, data, out, *more)) == 0
    return read(out)


def read(out: Path) -> pd.DataFrame:
    kinds = {"id": str, "problem": str, "report": str}
    return pd.read_csv(out, dtype=kinds).fillna({"problem": "", "report": ""})


def refused(
    capsys: pytest.CaptureFixture[str], words: list[str], *expected: str, out: Path | None = None
) -> bool:
    """Expect code 2, one line, and nothing written; tell whether it names all of ``expected``."""
    capsys.readouterr()
    assert trainer.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert out is None or not list(out.parent.glob(f"*{out.name}*"))
    sys.stdout.write(error)  # shown where the test fails
    return all(text in error for text in expected)


@pytest.fixture(scope="module")
def scored(runs: Path) -> dict[str, pd.DataFrame]:
    """Give the predictions of each stage for its whole file."""
    more = ("--batch_size", "7")
    return {
        stage: predicted(runs / stage, runs / "train.csv", runs / f"{stage}.csv", *more)
        for stage in STAGES
    }


@pytest.mark.parametrize("stage", STAGES)
def test_predictions_are_those_of_the_run(
    stage: str, runs: Path, table: pd.DataFrame, scored: dict[str, pd.DataFrame]
) -> None:
    out = scored[stage]
    assert out["id"].tolist() == table["id"].tolist()  # the input's order
    assert list(out)[-1] == "problem"
    assert (out["problem"] == "").all()
    known = out.set_index("id")["probability"]
    assert known.std() > 1e-4  # a model that says one thing proves nothing
    for part in ("val", "test"):
        own = pd.read_csv(runs / stage / f"predictions_{part}.csv").set_index("id")
        assert np.abs(known[own.index] - own["probability"]).max() < 1e-6
    threshold = json.loads((runs / stage / "metrics.json").read_text())["threshold"]
    clear = (out["probability"] - threshold).abs() > 1e-6  # at the very threshold sums may round
    assert (out["prediction"] == (out["probability"] >= threshold))[clear].all()
    assert set(out["prediction"]) == {0, 1}


def test_reports_are_those_of_the_run(runs: Path, scored: dict[str, pd.DataFrame]) -> None:
    out = scored["generative"]
    lines = (runs / "generative" / "generations_test.jsonl").read_text().splitlines()
    own = {line["id"]: line["text"] for line in map(json.loads, lines)}
    written = out.set_index("id")["report"]
    assert {i: written[i] for i in own} == own
    assert list(out) == ["id", "probability", "prediction", "report", "problem"]


def test_stage_1_is_found_by_its_file_too(runs: Path, tmp_path: Path) -> None:
    data = runs / "train.csv"
    by_folder = predicted(runs / "trajectory", data, tmp_path / "a.csv")
    by_file = predicted(runs / trainer.TRAJECTORY_FILE, data, tmp_path / "b.csv")
    pd.testing.assert_frame_equal(by_folder, by_file)


@pytest.mark.parametrize("stage", STAGES)
def test_labels_may_be_missing_wrong_or_absent(
    stage: str, runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    few = table.head(20)
    whole = predicted(runs / stage, write(few, tmp_path / "whole.csv"), tmp_path / "1.csv")
    labels = few.assign(label_escalation=["", "2", "yes", "0"] * 5, split="nowhere")
    for name, changed in {"labels": labels, "none": few.drop(columns="label_escalation")}.items():
        data = write(changed, tmp_path / f"{name}.csv")
        again = predicted(runs / stage, data, tmp_path / f"{name}_out.csv")
        pd.testing.assert_frame_equal(again, whole, rtol=0, atol=1e-6)


def spoil(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[int, str]]:
    """Give a table with rows that cannot be scored, and what must be said of each."""
    bad = table.head(30).copy()
    cells = {
        3: (SERIES, f"24 (0h) -> {MARKER} (2h)", f"column {SERIES}: piece 2 is not of the form"),
        4: (SERIES, "", f"column {SERIES}: is empty"),
        9: (SERIES, f"24 ({MARKER}h)", f"column {SERIES}: piece 1 is not of the form"),
        10: (SERIES, "1e99 (0h)", f"column {SERIES}: holds a number that is too large"),
        11: ("subject_id", "", "column subject_id: is empty"),
        12: (SERIES, "24 (0h) -> 22 (900000h)", "two observations lie more than 720000 h apart"),
        29: (SERIES, "24 (0h) ->", f"column {SERIES}: piece 2 is not of the form"),
    }
    for row, (column, content, _) in cells.items():
        bad.loc[row, column] = content
    bad["clinical_context"] = f"54-year-old {MARKER}"
    return bad, {row: problem for row, (_, _, problem) in cells.items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rows", [3, 1000])
def test_bad_rows_are_kept_with_their_problem(
    stage: str,
    rows: int,
    runs: Path,
    table: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trainer, "PIECE_ROWS", rows)
    monkeypatch.setattr(trainer, "LLM_PIECE_ROWS", rows)
    bad, problems = spoil(table)
    out = predicted(runs / stage, write(bad, tmp_path / "bad.csv"), tmp_path / "out.csv")
    assert out["id"].tolist() == bad["id"].tolist()
    assert {row for row, problem in enumerate(out["problem"]) if problem} == set(problems)
    for row, problem in problems.items():
        assert problem in out["problem"][row]
    fine = out["problem"] == ""
    assert out["probability"].notna().equals(fine)
    assert out["prediction"].notna().equals(fine)
    alone = write(bad[fine.to_numpy()], tmp_path / "good.csv")
    good = predicted(runs / stage, alone, tmp_path / "good_out.csv")
    same = out[fine].reset_index(drop=True)
    pd.testing.assert_frame_equal(same, good, rtol=0, atol=1e-6, check_dtype=False)
    said = capsys.readouterr()
    assert MARKER not in said.out + said.err
    assert MARKER not in "".join(out["problem"])
    assert "30 rows: 23 scored" in said.out
    assert said.out.count("1 rows were not in time order") == 2  # once a command, not a piece


def test_a_row_with_too_many_fields_is_kept_with_its_problem(runs: Path, tmp_path: Path) -> None:
    data = write(pd.DataFrame({"id": [], SERIES: []}), tmp_path / "bad.csv")
    data.write_text(f"id,{SERIES}\na,24 (0h)\n\nb,24 (0h),22 (1h)\nc,24 (0h)\n")
    out = predicted(runs / "trajectory", data, tmp_path / "out.csv")
    assert out["id"].tolist() == ["a", "b", "c"]
    assert out["probability"].isna().tolist() == [False, True, False]
    assert "3 fields where the header has 2" in out["problem"][1]


@pytest.mark.parametrize("row", [3, 4, 9, 10, 11, 12, 29])
def test_strict_refuses_the_file_with_row_and_column(
    row: int,
    runs: Path,
    table: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trainer, "PIECE_ROWS", 4)  # the row counts in the file, not in a piece
    bad, problems = spoil(table)
    good = table.head(30).copy()
    good.loc[row] = bad.loc[row]
    data, out = write(good, tmp_path / "bad.csv"), tmp_path / "out.csv"
    where = problems[row].split(":")[0]
    words = words_of(runs / "trajectory", data, out, "--strict")
    assert refused(capsys, words, f"bad.csv, row {row + 2}", where, out=out)
    assert MARKER not in "".join(capsys.readouterr())


def test_strict_still_asks_for_no_label(runs: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    few = table.head(6).assign(label_escalation=["", "0"] * 3)
    data = write(few, tmp_path / "few.csv")
    out = predicted(runs / "trajectory", data, tmp_path / "out.csv", "--strict")
    assert out["probability"].notna().all()


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet"])
def test_pieces_and_storage_do_not_matter(
    ending: str, runs: Path, table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, _ = spoil(table)
    whole = predicted(runs / "trajectory", write(bad, tmp_path / "a.csv"), tmp_path / "0.csv")
    data = tmp_path / f"a.{ending}"
    if ending == "csv.gz":
        data.write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    elif ending == "parquet":
        pytest.importorskip("pyarrow")
        typed = bad.astype({"label_escalation": int}).set_index("subject_id")
        typed.to_parquet(data, row_group_size=7)  # a pandas index, as whoever saves one has it
    for rows in (1, 7, 30, 31):
        monkeypatch.setattr(trainer, "PIECE_ROWS", rows)
        out = predicted(runs / "trajectory", data, tmp_path / f"{rows}.csv")
        pd.testing.assert_frame_equal(out, whole, rtol=0, atol=1e-6)


def test_a_file_without_ids_names_rows_as_the_run_does(
    runs: Path, table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "PIECE_ROWS", 4)
    data = write(table.head(10)[[SERIES]], tmp_path / "plain.csv")
    out = predicted(runs / "trajectory", data, tmp_path / "out.csv")
    assert out["id"].tolist() == [str(k) for k in range(2, 12)]


@pytest.mark.parametrize("kind", ["series", "unit", "outcome", "none"])
@pytest.mark.parametrize("stage", ["trajectory", "classification"])
def test_a_file_of_another_kind_is_refused_with_what_differs(
    kind: str,
    stage: str,
    runs: Path,
    table: pd.DataFrame,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = {
        "series": {"series": "Lactate"},
        "unit": {"unit": "mg/dL"},
        "outcome": {"outcome": "Stroke"},
    }
    data, out = write(table, tmp_path / "other.csv", **words.get(kind, {})), tmp_path / "out.csv"
    if kind == "none":
        data.with_suffix(".json").unlink()
    expected = {
        "series": ("Serum bicarbonate", "Lactate"),
        "unit": ("mmol/L", "mg/dL"),
        "outcome": ("In-hospital death", "Stroke"),
        "none": ("Serum bicarbonate", "Anion gap", "JSON"),
    }
    assert refused(capsys, words_of(runs / stage, data, out), *expected[kind], out=out)


def test_several_series_are_read_by_name_and_others_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    few = pd.read_csv(SAMPLE, nrows=60, dtype=str)
    few["trajectory_lactate [mmol/L]"] = [f"{v:.1f} (3h)" for v in rng.uniform(1, 9, 60)]
    few["trajectory_pH"] = ["" if k % 3 else "7.2 (1h)" for k in range(60)]
    data = write(few, tmp_path / "train.csv")
    place = ["--output_dir", str(tmp_path), "--log_file", "none"]
    place += ["--trajectory_only", "--trajectory_epochs", "1", "--data_path", str(data)]
    assert trainer.main([*place, "--series", "lactate,pH"]) == 0
    other = few[[few.columns[0], "trajectory_pH", SERIES, "trajectory_lactate [mmol/L]"]]
    other = other.assign(age="50", **{"trajectory_K": "4 (0h)"})
    new = write(other, tmp_path / "new.csv")
    out = predicted(tmp_path / "trajectory", new, tmp_path / "out.csv").set_index("id")
    own = pd.read_csv(tmp_path / "trajectory" / "predictions_test.csv", dtype={"id": str})
    difference = out["probability"][own["id"]].to_numpy() - own["probability"].to_numpy()
    assert np.abs(difference).max() < 1e-6
    other.loc[3, "trajectory_pH"] = "sour"
    other.loc[4, ["trajectory_pH", "trajectory_lactate [mmol/L]"]] = ""
    out = predicted(tmp_path / "trajectory", write(other, new), tmp_path / "out.csv")
    assert "column trajectory_pH: piece 1" in out["problem"][3]
    assert "no series of this row" in out["problem"][4]
    assert (out["problem"] != "").sum() == 2
    lacks = write(other.drop(columns="trajectory_pH"), tmp_path / "lacks.csv")
    target = tmp_path / "lacking.csv"
    words = words_of(tmp_path / "trajectory", lacks, target)
    assert refused(capsys, words, "pH", "lactate", out=target)


@pytest.fixture(scope="module")
def srtr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A liver folder and a run of stage 1 on it."""
    place = tmp_path_factory.mktemp("srtr")
    write_folder(place / "data", *random_tables(300, "liver", seed=1))
    words = ["--trajectory_only", "--dataset", "srtr", "--organ", "liver", "--log_file", "none"]
    words += ["--data_dir", str(place / "data"), "--output_dir", str(place)]
    assert trainer.main([*words, "--trajectory_epochs", "2", "--transplant", "exclude"]) == 0
    return place


def srtr_words(srtr: Path, data: Path, out: Path, *more: str) -> list[str]:
    words = ["--predict", "--checkpoint", str(srtr / "trajectory"), "--data_dir", str(data)]
    return [*words, "--predictions", str(out), *more]


def test_srtr_predictions_are_those_of_the_run(
    srtr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "PIECE_ROWS", 50)
    out = tmp_path / "out.csv"
    assert trainer.main(srtr_words(srtr, srtr / "data", out, "--organ", "liver")) == 0
    lines = read(out)
    asked = SRTRTrajectoryDataset(srtr / "data", "liver", require_labels=False)
    assert lines["id"].tolist() == asked.ids.tolist()
    own = pd.read_csv(srtr / "trajectory" / "predictions_test.csv", dtype={"id": str})
    known = lines.set_index("id")["probability"][own["id"]].to_numpy()
    assert np.abs(known - own["probability"]).max() < 1e-6


def test_registrations_without_a_known_outcome_are_scored_and_their_future_not_seen(
    srtr: Path, tmp_path: Path
) -> None:
    cand, history = filler()
    dead = {"CAN_REM_CD": 8, "CAN_REM_DT": LISTED + 120, "CAN_DEATH_DT": LISTED + 120}
    futures: dict[int, dict[str, Any]] = {
        1: {"CAN_ENDWLFU": LISTED + 130},  # still waits, the horizon not over
        2: {"CAN_REM_CD": 12, "CAN_REM_DT": LISTED + 130},
        3: {"CAN_REM_CD": 4, "CAN_REM_DT": LISTED + 130, "REC_TX_DT": LISTED + 130},
        4: dead,
        5: {},
    }
    cand += [candidate(px, **future) for px, future in futures.items()]
    cand.append(candidate(6, CAN_ENDWLFU=LISTED + 80))  # the landmark has not come
    for px in range(1, 7):
        history += [history_row(px, 10), history_row(px, 125, CANHX_BILI=30.0 + px)]
    folder, out = write_folder(tmp_path / "new", cand, history), tmp_path / "out.csv"
    assert trainer.main(srtr_words(srtr, folder, out)) == 0
    known = read(out).set_index("id")["probability"]
    assert "6" not in known.index
    assert known[[str(px) for px in futures]].nunique() == 1  # alike up to the landmark
    dataset = SRTRTrajectoryDataset(folder, "liver", transplant="exclude", require_labels=False)
    labels = dict(zip(dataset.ids.tolist(), dataset.labels.tolist(), strict=True))
    assert np.isnan([labels["1"], labels["2"], labels["3"]]).all()
    assert (labels["4"], labels["5"]) == (1.0, 0.0)
    trained = SRTRTrajectoryDataset(folder, "liver", transplant="exclude")
    assert set(trained.ids.tolist()) == set(dataset.ids.tolist()) - {"1", "2", "3"}


def test_another_dataset_or_organ_is_refused(
    srtr: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out.csv", srtr / "data"
    assert refused(
        capsys, srtr_words(srtr, data, out, "--organ", "kidney"), "kidney", "liver", out=out
    )
    assert refused(capsys, srtr_words(srtr, data, out, "--dataset", "dka"), "dka", "srtr", out=out)
    kidney = write_folder(tmp_path / "kidney", *random_tables(50, "kidney", seed=1), "kidney")
    assert refused(capsys, srtr_words(srtr, kidney, out), "cand_liin", "trained on liver", out=out)
    words = words_of(srtr / "trajectory", runs / "train.csv", out)
    assert refused(capsys, words, "--data_path", "srtr", "--data_dir", out=out)
    words = ["--predict", "--checkpoint", str(runs / "trajectory"), "--predictions", str(out)]
    assert refused(capsys, [*words, "--data_dir", str(data)], "--data_dir", "dka", out=out)
    assert refused(capsys, words, "--data_path", out=out)


@pytest.mark.parametrize("flag", ["--max_len 5", "--epochs=3", "--solver rk4", "--series x"])
def test_flags_that_the_checkpoint_decides_are_refused(
    flag: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    words = words_of(runs / "trajectory", runs / "train.csv", out, *flag.split())
    assert refused(capsys, words, "--predict", flag.replace("=", " ").split()[0], out=out)


@pytest.mark.parametrize("flag", ["--checkpoint x", "--predictions x", "--strict"])
def test_training_refuses_flags_of_predict(
    flag: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--trajectory_only", "--data_path", str(runs / "train.csv"), *flag.split()]
    assert refused(capsys, words, flag.split()[0], "--predict")


@pytest.mark.parametrize("missing", ["--checkpoint", "--predictions"])
def test_what_predict_needs_is_named(
    missing: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(runs / "trajectory", runs / "train.csv", tmp_path / "out.csv")
    place = words.index(missing)
    assert refused(capsys, words[:place] + words[place + 2 :], missing)


def copy_of(runs: Path, stage: str, place: Path) -> Path:
    """Copy the winner of a stage, to be damaged."""
    shutil.copy(runs / trainer.TRAJECTORY_FILE, place)
    shutil.copytree(runs / stage, place / stage)
    return place / stage


def no_place(folder: Path) -> None:
    shutil.rmtree(folder)


def no_best(folder: Path) -> None:
    no_place(folder / "best")


def no_config(folder: Path) -> None:
    (folder / "best" / "config.json").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "best" / "modules.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_adapter(folder: Path) -> None:
    (folder / "best" / "adapter" / "adapter_model.safetensors").unlink()


def other_head(folder: Path) -> None:
    place = folder / "best"
    state = load_file(place / "modules.safetensors")
    state["trajectory_head.output.bias"] = state.pop("trajectory_head.bias")
    save_file(state, place / "modules.safetensors")
    config = place / "config.json"
    facts = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps(trainer.seal(facts, place)))


def other_rank(folder: Path) -> None:
    file = folder / "best" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 4}))


def no_base(folder: Path) -> None:
    change_facts(folder, base_model="no/such_model")


def old(folder: Path) -> None:
    file = folder / "best" / "config.json"
    facts = json.loads(file.read_text())
    del facts["max_len"]
    write_facts(file, facts)


def change_facts(folder: Path, **facts: Any) -> None:
    file = folder / "best" / "config.json"
    write_facts(file, {**json.loads(file.read_text()), **facts})


def write_facts(file: Path, facts: dict[str, Any]) -> None:
    file.write_text(json.dumps({**facts, "facts_sha256": trainer.facts_hash(facts)}))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (no_place, "no such file or folder"),
        (no_best, "holds no winner"),
        (no_config, "damaged"),
        (cut_weights, "damaged"),
        (no_adapter, "damaged"),
        (other_rank, "damaged"),
        (other_head, "made by another version"),
        (no_base, "--model_name no/such_model"),
        (old, "older version, which did not keep max_len"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_one_line(
    damage: Callable[[Path], None],
    expected: str,
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = copy_of(runs, "classification", tmp_path), tmp_path / "out.csv"
    damage(folder)
    assert refused(capsys, words_of(folder, runs / "train.csv", out), expected, out=out)


def test_a_damaged_stage_1_file_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(runs / trainer.TRAJECTORY_FILE, weights_only=True)
    broken, out = tmp_path / "broken.pt", tmp_path / "out.csv"
    broken.write_bytes((runs / trainer.TRAJECTORY_FILE).read_bytes()[:-500])
    assert refused(capsys, words_of(broken, runs / "train.csv", out), "broken.pt", out=out)
    torch.save({**content, "format": 2}, broken)
    assert refused(capsys, words_of(broken, runs / "train.csv", out), "format 2", out=out)
    del content["head"]["bias"]
    torch.save(content, broken)
    assert refused(capsys, words_of(broken, runs / "train.csv", out), "damaged", out=out)


def test_the_base_model_may_lie_elsewhere(runs: Path, tmp_path: Path) -> None:
    folder = copy_of(runs, "classification", tmp_path)
    expected = predicted(folder, runs / "train.csv", tmp_path / "1.csv")
    model, tokenizer = trainer.tiny_language_model()
    model.save_pretrained(tmp_path / "moved")
    tokenizer.save_pretrained(tmp_path / "moved")
    change_facts(folder, base_model="no/such_model", base_revision="0" * 40)
    moved = ["--model_name", str(tmp_path / "moved"), "--quantization", "none"]
    out = predicted(folder, runs / "train.csv", tmp_path / "2.csv", *moved)
    pd.testing.assert_frame_equal(out, expected, rtol=0, atol=1e-6)
    rough = predicted(folder, runs / "train.csv", tmp_path / "3.csv", *moved, "--precision", "bf16")
    difference = np.abs(rough["probability"] - expected["probability"])
    assert 1e-6 < difference.max() < 0.05


def test_a_hub_model_is_asked_for_the_commit_it_was_trained_on(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = copy_of(runs, "classification", tmp_path), []
    change_facts(folder, base_revision="abc")

    def load(*arguments: Any) -> None:
        asked.append((arguments[0], arguments[-1]))
        raise InputError("not now")

    monkeypatch.setattr(trainer, "load_language_model", load)
    for name in (None, "elsewhere/model"):
        with pytest.raises(InputError, match="not now"):
            trainer.load_winner(folder, name)
    assert asked == [("tiny", "abc"), ("elsewhere/model", None)]


@pytest.mark.parametrize("stage", STAGES)
def test_recalibration_and_threshold_lie_with_the_weights(
    stage: str, runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    folder, data = copy_of(runs, stage, tmp_path), write(table.head(12), tmp_path / "few.csv")
    plain = predicted(folder, data, tmp_path / "1.csv")
    threshold = 0.3
    decision = {"slope": 2.0, "intercept": 0.5, "threshold": threshold, "method": "platt"}
    if stage == "trajectory":
        content = torch.load(tmp_path / trainer.TRAJECTORY_FILE, weights_only=True)
        content["config"]["decision"] = decision
        torch.save(content, tmp_path / trainer.TRAJECTORY_FILE)
    else:
        change_facts(folder, decision=decision)
    out = predicted(folder, data, tmp_path / "2.csv")
    logit = np.log(plain["probability"] / (1 - plain["probability"]))
    expected = 1 / (1 + np.exp(-(0.5 + 2 * logit)))
    assert np.abs(out["probability"] - expected).max() < 1e-6
    assert (out["prediction"] == (out["probability"] >= threshold)).all()


def test_a_text_that_is_too_long_is_a_problem_of_its_row(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = copy_of(runs, "classification", tmp_path), tmp_path / "out.csv"
    change_facts(folder, max_text_tokens=400)
    few = table.head(6).copy()
    few.loc[2, "clinical_context"] = "very " * 200
    data = write(few, tmp_path / "long.csv")
    lines = predicted(folder, data, out)
    assert [row for row, text in enumerate(lines["problem"]) if text] == [2]
    assert "longer than 400 tokens" in lines["problem"][2]
    out.unlink()
    assert refused(capsys, words_of(folder, data, out, "--strict"), "row 4", "400 tokens", out=out)


def test_an_existing_output_stays_when_the_run_fails(
    runs: Path, table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "PIECE_ROWS", 4)
    few = table.head(20).copy()
    few.loc[15, SERIES] = "oops"
    data, out = write(few, tmp_path / "bad.csv"), tmp_path / "out.csv"
    earlier = "id,probability,prediction,problem\n1,0.5,0,\n"
    out.write_text(earlier)
    assert trainer.main(words_of(runs / "trajectory", data, out, "--strict")) == 2
    cut = tmp_path / "bad.csv.gz"
    cut.write_bytes(gzip.compress(data.read_bytes())[:-40])
    assert trainer.main(words_of(runs / "trajectory", cut, out)) == 2
    assert out.read_text() == earlier

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Tally, "add", interrupted)
        assert trainer.main(words_of(runs / "trajectory", data, out)) == 130
    assert out.read_text() == earlier
    names = {"bad.csv", "bad.csv.gz", "bad.json", "out.csv"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert trainer.main(words_of(runs / "trajectory", data, out)) == 0
    assert out.read_text() != earlier


@pytest.mark.parametrize("moment", ["load_winner", "predict_rows", "remove"])
def test_two_runs_do_not_write_one_file(
    moment: str,
    runs: Path,
    table: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whenever the second one starts, until the first has ended."""
    monkeypatch.setattr(trainer, "PIECE_ROWS", 7)
    data, out = write(table.head(20), tmp_path / "few.csv"), tmp_path / "out.csv"
    words = words_of(runs / "trajectory", data, out)
    assert trainer.main(words) == 0
    expected, real, codes = out.read_text(), getattr(trainer, moment), []

    def meanwhile(*given: Any) -> Any:
        monkeypatch.setattr(trainer, moment, real)
        codes.append(trainer.main(words))
        return real(*given)

    out.unlink()
    monkeypatch.setattr(trainer, moment, meanwhile)
    assert trainer.main(words) == 0
    assert codes == [0 if moment == "load_winner" else 2]
    assert out.read_text() == expected
    assert not list(tmp_path.glob(".out.csv*"))


def test_the_lock_of_a_dead_run_is_no_hindrance(
    runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    data, out = write(table.head(20), tmp_path / "few.csv"), tmp_path / "out.csv"
    for name in (".out.csv.lock", ".out.csv.partial"):
        (tmp_path / name).write_text("left")
    assert trainer.main(words_of(runs / "trajectory", data, out)) == 0
    assert not list(tmp_path.glob(".out.csv*"))


def test_the_output_may_neither_be_the_input_nor_a_folder(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(table, tmp_path / "data.csv")
    before = data.read_bytes()
    for out in (data, tmp_path, tmp_path / "missing" / "out.csv"):
        assert refused(capsys, words_of(runs / "trajectory", data, out), "--predictions")
    assert data.read_bytes() == before


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
    out, data = tmp_path / "out.csv", write(table.head(0), tmp_path / f"empty.{ending}")
    assert refused(capsys, words_of(runs / "trajectory", data, out), "no rows", out=out)


def test_figures_are_those_of_the_labelled_rows(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = table.copy()
    mixed.loc[::3, "label_escalation"] = ""
    bad = mixed.index[1]
    mixed.loc[bad, SERIES] = "oops"
    out = tmp_path / "out.csv"
    lines = predicted(runs / "trajectory", write(mixed, tmp_path / "mixed.csv"), out)
    known = (mixed["label_escalation"] != "") & lines["probability"].notna()
    labels = mixed.loc[known, "label_escalation"].astype(int)
    score = roc_auc_score(labels, lines.loc[known, "probability"])
    said = capsys.readouterr().out
    assert f"{score:.3f} [" in said
    assert f"{int(known.sum())}\n" in said
    page = out.with_suffix(".report.html").read_text()
    threshold = trainer.winner_facts(runs / "trajectory")["decision"]["threshold"]
    assert f"At the chosen threshold of {100 * threshold:.3g} % risk" in page
    assert f"AUROC {score:.3f} [" in page
    assert "Case mix" in page
    mix = torch.load(runs / trainer.TRAJECTORY_FILE, weights_only=True)["config"]["case_mix"]
    (row,) = re.findall(r"<tr>\s*<th[^>]*>Rows</th>(.*?)</tr>", page, re.DOTALL)
    assert [f"{mix['rows']:,.0f}", f"{int(known.sum()):,}"] == re.findall(r"<td>(.*?)</td>", row)
    assert not any(f">{i}<" in page for i in mixed["id"]), "no id of a patient"
    few = write(table.head(3).assign(label_escalation="0"), tmp_path / "few.csv")
    predicted(runs / "trajectory", few, out)
    assert "one class only" in capsys.readouterr().out
    assert not out.with_suffix(".report.html").exists(), "the report of other predictions"


def test_figures_of_many_pieces_are_those_of_one(
    runs: Path, table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = table.copy()
    rows["subject_id"] = [f"p{k % 17}" for k in range(len(rows))]  # a patient in many pieces
    rows["split"] = "test"
    data = write(rows, tmp_path / "rows.csv")
    pages = []
    for name, size in (("one", 10_000), ("many", 7)):
        monkeypatch.setattr(trainer, "PIECE_ROWS", size)
        predicted(runs / "trajectory", data, tmp_path / f"{name}.csv")
        pages.append((tmp_path / f"{name}.report.html").read_text())
    # Where rows share other batches a risk may move in its seventh place.
    one, many = (re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL) for page in pages)
    number = r"-?\d+(?:\.\d+)?"
    assert re.sub(number, "#", one) == re.sub(number, "#", many)
    alone, together = (np.array(re.findall(number, page), dtype=float) for page in (one, many))
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1.5e-3)
    out = read(tmp_path / "many.csv")
    labels = rows["label_escalation"].astype(int).to_numpy()
    groups = rows["subject_id"].to_numpy(dtype=np.str_)
    hashed = pd.util.hash_array(groups.astype(object))
    expected = trainer.metrics_with_intervals(labels, out["probability"].to_numpy(), hashed, 0)
    assert f"AUROC {trainer.shown(expected['auroc'])}" in pages[1]
    (cells,) = re.findall(r"<tr>\s*<th[^>]*>Patients</th>(.*?)</tr>", pages[1], re.DOTALL)
    assert re.findall(r"<td>(.*?)</td>", cells)[1] == "17"


def test_nothing_else_is_written_over(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(table.head(9), tmp_path / "rows.csv")
    checkpoint = tmp_path / "kept.pt"
    shutil.copy(runs / trainer.TRAJECTORY_FILE, checkpoint)
    for taken in (checkpoint, data.with_suffix(".json"), tmp_path / "rows.html"):
        assert refused(capsys, words_of(checkpoint, data, taken), "the name of a .csv file")
    inside = runs / "trajectory" / "predictions_test.csv"
    assert refused(capsys, words_of(runs / "trajectory", data, inside), "not within")
    page = tmp_path / "new.report.html"
    page.write_text("<p>someone else's</p>")
    assert refused(capsys, words_of(checkpoint, data, tmp_path / "new.csv"), "new.report.html")
    assert page.read_text() == "<p>someone else's</p>"
    assert not (tmp_path / "new.csv").exists()
    page.unlink()
    for _ in range(2):  # its own page it replaces
        predicted(checkpoint, data, tmp_path / "new.csv")


def test_a_run_that_never_ended_is_said_to_have_no_threshold(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = torch.load(runs / trainer.TRAJECTORY_FILE, weights_only=True)
    del whole["config"]["decision"]
    torch.save(whole, tmp_path / "early.pt")
    data = write(table.head(9), tmp_path / "rows.csv")
    predicted(tmp_path / "early.pt", data, tmp_path / "new.csv")
    assert "keeps no threshold" in capsys.readouterr().out
    predicted(runs / "trajectory", data, tmp_path / "new.csv")
    assert "keeps no threshold" not in capsys.readouterr().out


def test_a_wrong_label_hinders_no_prediction_however_strict(
    runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    rows = table.head(9).copy()
    rows.loc[rows.index[2], "label_escalation"] = "maybe"
    data = write(rows, tmp_path / "rows.csv")
    out = predicted(runs / "trajectory", data, tmp_path / "new.csv", "--strict")
    assert out["probability"].notna().all()
    assert (out["problem"] == "").all()


PEAK = """
import sys, torch
torch.set_num_threads(1)
import medgemma_trainer
assert medgemma_trainer.main(sys.argv[1:]) == 0
print(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
"""
"""The most memory held, in KiB; getrusage would count what the test's own process held."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells no peak of its own")
def test_memory_does_not_grow_with_the_rows(runs: Path, tmp_path: Path) -> None:
    peaks = []
    for rows in (10_000, 200_000):
        data = write(pd.DataFrame({SERIES: ["24 (0h) -> 20 (2h)"]}), tmp_path / f"{rows}.csv")
        lines = "".join(f"{k},{20 + k % 9} (0h) -> {k % 30} (2h)\n" for k in range(rows))
        data.write_text(f"subject_id,{SERIES}\n{lines}")
        out = tmp_path / f"{rows}_out.csv"
        command = [sys.executable, "-c", PEAK, *words_of(runs / "trajectory", data, out)]
        root = Path(trainer.__file__).parent
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout.splitlines()[-1]) / 1024)  # MiB
        assert len(pd.read_csv(out)) == rows
    assert peaks[1] - peaks[0] < 40, peaks


def test_load_winner_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        trainer.load_winner(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"max_len": "20"}, "max_len"),
        ({"stage": "other"}, "stage"),
        ({"features": []}, "features"),
        ({"units": []}, "units"),
        ({"decision": {"slope": float("nan")}}, "decision"),
        ({"decision": {"slope": -1.0}}, "decision"),
        ({"precision": 3}, "precision"),
        ({"series_text": "bogus"}, "series_text"),
    ],
)
def test_facts_that_cannot_be_are_refused(
    facts: dict[str, Any],
    problem: str,
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = copy_of(runs, "classification", tmp_path), tmp_path / "out.csv"
    change_facts(folder, **facts)
    words = words_of(folder, runs / "train.csv", out)
    assert refused(capsys, words, "damaged: its ", problem, out=out)


def test_a_runs_own_folder_and_other_tables_are_not_written_over(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(table, tmp_path / "new.csv")
    place = shutil.copytree(runs / "trajectory", tmp_path / "trajectory")
    before = (place / "predictions_test.csv").read_bytes()
    words = words_of(runs / trainer.TRAJECTORY_FILE, data, place / "predictions_test.csv")
    assert refused(capsys, words, "a run's own folder")
    assert (place / "predictions_test.csv").read_bytes() == before
    other = write(table, tmp_path / "other.csv")
    kept = other.read_bytes()
    assert refused(capsys, words_of(runs / "trajectory", data, other), "holds something else")
    assert other.read_bytes() == kept
    out = tmp_path / "out.csv"
    for _ in range(2):  # its own output it may replace
        predicted(runs / "trajectory", data, out)
    out.with_suffix(".report.html").unlink()
    out.with_suffix(".report.html").mkdir()
    assert refused(capsys, words_of(runs / "trajectory", data, out), "which is a folder")


def test_an_interrupted_report_is_not_called_nothing(
    runs: Path,
    table: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = write(table, tmp_path / "new.csv"), tmp_path / "out.csv"
    predicted(runs / "trajectory", data, out)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "write_report", interrupted)
    capsys.readouterr()
    assert trainer.main(words_of(runs / "trajectory", data, out)) == 130
    assert "the predictions are written, their figures are not" in capsys.readouterr().err
    assert len(pd.read_csv(out)) == len(table)
    assert not out.with_suffix(".report.html").exists(), "the page of other predictions"
