"""Stage 1 on SRTR tables learns a risk that the history shows; ``test_srtr_altered`` on leaks."""

import json

import pytest

import medgemma_trainer
from srtr_files import random_tables, write_folder

WORDS = ["--trajectory_only", "--dataset", "srtr", "--log_file", "none"]


@pytest.mark.slow
def test_stage_1__learns_what_meld_decides(tmp_path):
    folder = write_folder(tmp_path / "saf", *random_tables(300, "liver", seed=11))
    words = [*WORDS, "--organ", "liver", "--data_dir", str(folder), "--trajectory_epochs", "6"]
    assert medgemma_trainer.main([*words, "--output_dir", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "trajectory" / "metrics.json").read_text())
    assert metrics["test"]["auroc"]["value"] > 0.9


def test_main__asks_for_the_folder_of_srtr(capsys):
    assert medgemma_trainer.main(WORDS) == 2
    assert "--data_dir" in capsys.readouterr().err
