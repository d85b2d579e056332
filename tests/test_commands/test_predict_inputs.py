"""What a model reads beside the series, at ``--predict``: facts and the prediction time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import medgemma_trainer as trainer
from medgemma_clinical.commands import results
from medgemma_clinical.evaluation import bootstrap
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.trained_model import read_trained_config
from predicting import SERIES, command, predicted, refused, write_data

FACTS = ["static_bmi [kg/m2]", "static_admissions"]
TINY = ["--model_name", "tiny", "--epochs", "1", "--adapter_lr", "0.01"]


@pytest.fixture(scope="module")
def asked(table: pd.DataFrame) -> pd.DataFrame:
    """The stays with two declared facts and a prediction time, some of them unknown."""
    rng = np.random.default_rng(0)
    hours = table[SERIES].str.findall(r"\(([\d.]+)h\)").map(lambda each: max(map(float, each)))
    asked = table.drop(columns="clinical_context")
    asked[FACTS[0]] = [f"{bmi:.1f}" if bmi > 23 else "" for bmi in rng.normal(27, 4, len(table))]
    asked[FACTS[1]] = rng.integers(0, 4, len(table)).astype(str)
    asked["prediction_hours"] = (hours + rng.integers(0, 40, len(table))).astype(str)
    asked.loc[4::6, "prediction_hours"] = ""
    return asked


@pytest.fixture(scope="module")
def place(asked: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two members of stage 1, and models upon them, some by half of their weight."""
    place = tmp_path_factory.mktemp("inputs")
    data = write_data(asked, place / "train.csv")
    words = ["--data_path", str(data), "--output_dir", str(place), "--log_file", "none"]
    words += ["--min_cell", "0", "--batch_size", "8", "--encoder_lr", "0.05"]
    stage1 = ["--trajectory_only", "--trajectory_epochs", "2", "--members", "2"]
    upon = [*TINY, "--ode_checkpoint", str(place / TRAJECTORY_FILE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "REPLICATES", 20)
        patch.setattr(results, "fit_residual_weight", lambda *_: 0.5)
        for flags in (
            stage1,
            upon,
            [*TINY, "--soft_prompt", "off", "--output_dir", f"{place}/text"],
            [*upon, "--soft_prompt", "off", "--output_dir", f"{place}/logit"],
            [*upon, "--stage1_logit", "off", "--output_dir", f"{place}/alone"],
        ):
            assert trainer.main([*words, *flags]) == 0
    return place


@pytest.mark.parametrize(
    "stage", ["trajectory", "classification", "logit/classification", "alone/classification"]
)
def test_the_risks_are_those_of_the_run(
    stage: str, place: Path, asked: pd.DataFrame, tmp_path: Path
) -> None:
    config = read_trained_config(place / stage)
    assert config["inputs"] == {"facts": FACTS, "prediction_time": True}
    assert config["members"] == 2
    data = write_data(asked, tmp_path / "rows.csv")
    out = predicted(place / stage, data, tmp_path / "out.csv").set_index("id")
    own = pd.read_csv(place / stage / "predictions_test.csv", dtype={"id": str}).set_index("id")
    difference = out["probability"][own.index] - own["probability"]
    assert len(own) == 10
    assert difference.abs().max() < 1e-6


@pytest.mark.parametrize("column", [*FACTS, "prediction_hours"])
def test_each_input_moves_the_risk(
    column: str, place: Path, asked: pd.DataFrame, tmp_path: Path
) -> None:
    rows = asked[(asked[[*FACTS, "prediction_hours"]] != "").all(axis=1)].head(9)
    before = predicted(
        place / "trajectory", write_data(rows, tmp_path / "1.csv"), tmp_path / "a.csv"
    )
    changed = rows.assign(**{column: (rows[column].astype(float) + 5).astype(str)})
    after = predicted(
        place / "trajectory", write_data(changed, tmp_path / "2.csv"), tmp_path / "b.csv"
    )
    assert ((before["probability"] - after["probability"]).abs() > 1e-6).all()


@pytest.mark.parametrize("column", [*FACTS, "prediction_hours"])
def test_a_file_without_an_input_is_refused_by_its_name(
    column: str,
    place: Path,
    asked: pd.DataFrame,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = write_data(asked.drop(columns=column), tmp_path / "rows.csv"), tmp_path / "out.csv"
    assert refused(capsys, command(place / "trajectory", data, out), column, out=out)


def test_text_alone_asks_for_no_input_of_stage_1(
    place: Path, asked: pd.DataFrame, tmp_path: Path
) -> None:
    bare = asked.drop(columns=[*FACTS, "prediction_hours"]).head(9)
    data = write_data(bare, tmp_path / "rows.csv")
    out = predicted(place / "text" / "classification", data, tmp_path / "out.csv")
    assert out["problem"].tolist() == [""] * 9


def test_rows_that_lack_a_fact_are_counted(
    place: Path, asked: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = asked.head(9).assign(**{FACTS[1]: ["", "", *["1"] * 7]})
    predicted(place / "trajectory", write_data(rows, tmp_path / "a.csv"), tmp_path / "out.csv")
    assert f"lack the fact {FACTS[1]}: taken as unknown" in capsys.readouterr().out


def test_a_stage_upon_stage_1_needs_the_contexts_that_it_reads(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(table.drop(columns="clinical_context"), tmp_path / "bare.csv")
    words = ["--data_path", str(data), "--output_dir", str(tmp_path / "run"), *TINY]
    words += ["--ode_checkpoint", str(runs / TRAJECTORY_FILE), "--log_file", "none"]
    assert trainer.main(words) == 2
    assert "stage 1 reads facts of the context, which no row has" in capsys.readouterr().err
