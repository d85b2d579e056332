"""Attacks by model files on the whole program: code, endless facts, and paths in what is shared."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import medgemma_trainer as trainer
from conftest import SAMPLE
from language_models import bring_code, rehash, save_text_checkpoint
from medgemma_clinical.models.checkpoints import ADAPTER_CONFIG, TRAJECTORY_FILE
from medgemma_clinical.models.language_model import base_content_hash
from predicting import command, read_predictions, refused, write_data


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each stage on a base model in a folder, every place given with its whole path."""
    place = tmp_path_factory.mktemp("jdoe")
    base = save_text_checkpoint(place / "models" / "gemma")
    data = write_data(pd.read_csv(SAMPLE, nrows=80, dtype=str), place / "train.csv")
    small = ["--data_path", str(data), "--output_dir", str(place / "out"), "--log_file", "none"]
    small += ["--batch_size", "8", "--trajectory_epochs", "1", "--epochs", "1"]
    assert trainer.main(["--trajectory_only", *small]) == 0
    small += ["--model_name", str(base), "--ode_checkpoint", str(place / "out" / TRAJECTORY_FILE)]
    for mode in ("classification", "generative"):
        assert trainer.main(["--mode", mode, *small]) == 0
    return place


@pytest.fixture
def stage(place: Path, tmp_path: Path) -> Path:
    """A copy of the folder of stage 2 that a test may change."""
    return Path(shutil.copytree(place / "out" / "classification", tmp_path / "classification"))


def files_with(text: str, folder: Path) -> set[str]:
    """Return the names of the files below a folder whose content holds a text."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return {path.name for path in files if text.encode() in path.read_bytes()}


def test_no_file_but_run_json_holds_a_path(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = place / "out", place / "train.csv"
    small = ["--data_path", str(data), "--log_file", "none", "--trajectory_epochs", "1"]
    seeds = ["--seeds", "2", "--output_dir", str(place / "seeds")]
    assert trainer.main(["--trajectory_only", *small, *seeds]) == 0
    (place / "new").mkdir()
    for name in ("trajectory", "classification"):
        assert trainer.main(command(out / name, data, place / "new" / f"{name}.csv")) == 0
    assert (place / "new" / "classification.report.html").exists()
    capsys.readouterr()
    assert trainer.main(["--compare", str(out / "trajectory"), str(out / "classification")]) == 0
    shown = capsys.readouterr().out
    assert "stage 1 (trajectory alone)" in shown
    assert str(place) not in shown
    assert files_with(str(place), out) == {"run.json"}
    assert files_with(str(place), place / "seeds") == {"run.json"}
    assert files_with(str(place), place / "new") == set()
    assert {"config.json", "adapter_config.json", "README.md", "report.html"} <= files_with(
        "gemma", out
    )


def test_a_shared_folder_needs_the_place_of_its_base_model(
    place: Path, stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pd.read_csv(place / "train.csv", nrows=6, dtype=str).drop(columns="label_escalation")
    data, out = write_data(rows, tmp_path / "new.csv"), tmp_path / "out.csv"
    assert trainer.main(command(stage, data, out)) == 0
    expected = read_predictions(out)
    out.unlink()
    best, words = stage / "best", ["its base model is a folder named gemma", "by --model_name"]
    (stage / "run.json").unlink()
    assert refused(capsys, command(best, data, out), *words, out=out)
    moved = shutil.copytree(place / "models" / "gemma", tmp_path / "moved")
    assert trainer.main(command(best, data, out, "--model_name", str(moved))) == 0
    pd.testing.assert_frame_equal(read_predictions(out), expected)


@pytest.mark.parametrize("whole", [True, False])
def test_code_of_a_base_model_does_not_run_whatever_is_answered(
    whole: bool,
    place: Path,
    stage: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, ran = shutil.copytree(place / "models" / "gemma", tmp_path / "gemma"), tmp_path / "ran"
    bring_code(base, ran, whole=whole)
    rehash(stage / "best", base_sha256=base_content_hash(str(base)))
    run = json.loads((stage / "run.json").read_text())
    run["arguments"]["model_name"] = str(base)
    (stage / "run.json").write_text(json.dumps(run))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    training = ["--data_path", str(place / "train.csv"), "--dry_run", "--max_samples", "40"]
    training += ["--model_name", str(base), "--soft_prompt", "off"]
    prediction = command(stage, place / "train.csv", tmp_path / "out.csv")
    for words in (training, prediction):
        if whole:
            assert trainer.main(words) == 0
            assert "language model: gemma, a folder" in capsys.readouterr().out
        else:
            assert refused(capsys, words, "--model_name", "only Gemma 3 models")
    assert not ran.exists()


def endless_adapter(best: Path) -> None:
    adapter = json.loads((best / ADAPTER_CONFIG).read_text())
    (best / ADAPTER_CONFIG).write_text(json.dumps({**adapter, "lora_alpha": 10**400}))
    rehash(best)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda best: rehash(best, num_prefix_tokens=10**9), "num_prefix_tokens 1000000000"),
        (lambda best: rehash(best, num_prefix_tokens=float("nan")), "num_prefix_tokens nan"),
        (lambda best: rehash(best, base_model="\x1b[2Jevil"), r"base_model '\x1b[2Jevil'"),
        (lambda best: rehash(best, base_model="../evil", base_sha256=None), "base_model '../evil'"),
        (endless_adapter, "lora_alpha (an endless number)"),
    ],
)
def test_endless_facts_are_refused_in_one_line(
    harm: Any,
    expected: str,
    place: Path,
    stage: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    harm(stage / "best")
    words = command(stage, place / "train.csv", tmp_path / "out.csv")
    assert refused(capsys, words, expected, out=tmp_path / "out.csv")
