"""Stage 1 on SRTR tables: a risk that the history shows is learned, and chance is not."""

import json

import pytest

import medgemma_trainer
from srtr_files import random_tables, write_folder


@pytest.mark.parametrize(("risk", "low", "high"), [("MELD", 0.9, 1.0), ("shuffled", 0.0, 0.75)])
def test_what_meld_decides_is_learned_and_chance_is_not(risk, low, high, tmp_path):
    folder = write_folder(tmp_path / "saf", *random_tables(900, "liver", seed=11, risk=risk))
    flags = f"--trajectory_only --dataset srtr --organ liver --data_dir {folder} --log_file none"
    words = [*flags.split(), "--trajectory_epochs", "6", "--output_dir", str(tmp_path / "out")]
    assert medgemma_trainer.main(words) == 0
    metrics = json.loads((tmp_path / "out" / "trajectory" / "metrics.json").read_text())
    assert low < metrics["test"]["auroc"]["value"] <= high


def test_the_trainer_asks_for_the_folder(capsys):
    words = ["--trajectory_only", "--dataset", "srtr", "--log_file", "none"]
    assert medgemma_trainer.main(words) == 2
    assert "--data_dir" in capsys.readouterr().err
