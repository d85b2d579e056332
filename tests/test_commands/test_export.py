"""``--export``: a folder that servers read and that predicts as the run does, or one line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from medgemma_clinical.inference.merge_proof import MergeProof

import medgemma_trainer as trainer
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.commands import export as export_command
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trained_model import load_trained_model
from merged_models import save_base, save_stage
from predicting import MARKER, predicted, read_predictions, refused, write_data

FILE = "medgemma_trajectory_best.pt"
PAGE = Path(trainer.__file__).parent / "medgemma_clinical" / "docs" / "serving.md"


def command(checkpoint: Path, out: Path, *more: str) -> list[str]:
    words = ["--export", "merged", "--checkpoint", str(checkpoint), "--export_dir", str(out)]
    return [*words, *more]


@pytest.mark.parametrize("stage", ["classification", "generative"])
def test_an_export_predicts_as_the_run_does(
    stage: str,
    runs: Path,
    table: pd.DataFrame,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_data(table.head(15).drop(columns="label_escalation"), tmp_path / "few.csv")
    capsys.readouterr()
    assert trainer.main(command(runs / stage, tmp_path / "out")) == 0
    said = capsys.readouterr().out
    shares = re.search(r"proof: .* 32 rows: .* vocabulary (\S+) of .* own logit (\S+) of", said)
    assert shares is not None
    assert max(map(float, shares.groups())) < 1e-4
    assert "share of the adapter's effect found: 1.00 and 1.00" in said
    assert f"export: {tmp_path / 'out'}, its language_model/ for other programs" in said
    expected = predicted(runs / stage, data, tmp_path / "1.csv")
    found = predicted(tmp_path / "out", data, tmp_path / "2.csv")
    assert expected["probability"].std() > 1e-4
    pd.testing.assert_frame_equal(found, expected, rtol=0, atol=1e-6)


def test_only_the_owner_reads_the_folder(runs: Path, tmp_path: Path) -> None:
    assert trainer.main(command(runs / "generative", tmp_path / "out")) == 0
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_contexts_of_patients_are_not_in_the_folder(
    table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = table.assign(clinical_context=[f"{MARKER} {k}" for k in range(len(table))])
    few["id"] = few["subject_id"] = [f"{MARKER}-{k}" for k in range(len(table))]
    data = write_data(few, tmp_path / "train.csv")
    words = ["--mode", "classification", "--model_name", "tiny", "--epochs", "1"]
    words += ["--log_file", "none"]
    words += ["--data_path", str(data), "--output_dir", str(tmp_path), "--batch_size", "32"]
    assert trainer.main(words) == 0
    capsys.readouterr()
    assert trainer.main(command(tmp_path / "classification", tmp_path / "out")) == 0
    assert MARKER not in "".join(capsys.readouterr())
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or MARKER.encode() not in path.read_bytes(), path


def test_the_base_model_may_lie_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(tmp_path / "gemma")
    stage = save_stage(tmp_path / "run", "classification", base, "nf4", "bf16")
    base.rename(tmp_path / "moved")
    out = tmp_path / "out"
    assert refused(capsys, command(stage, out), "give it by --model_name", out=out)
    assert trainer.main(command(stage, out, "--model_name", str(tmp_path / "moved"))) == 0
    other = save_base(tmp_path / "other", lively=True)
    again = command(stage, tmp_path / "again", "--model_name", str(other))
    assert refused(capsys, again, f"--model_name {other}", out=tmp_path / "again")


# --------------------------------------------------------------------------- mistakes


def test_stage_1_is_refused_with_advice(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (runs / FILE, runs / "trajectory"):
        words = command(place, tmp_path / "out")
        advice = "use its .pt as it is, or name the folder classification or generative"
        assert refused(capsys, words, "stage 1 has no language model", advice)
    assert list(tmp_path.iterdir()) == []


def test_each_mistake_is_one_line_and_leaves_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("[")
    (tmp_path / "file").touch()
    stage, out = runs / "generative", tmp_path / "out"
    damaged = Path(shutil.copytree(stage / "best", tmp_path / "damaged"))
    (damaged / "modules.safetensors").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    for words, problem in (
        (command(tmp_path / "absent", out), "no such file or folder"),
        (command(tmp_path / "full", out), "holds no trained model"),
        (command(damaged, out), "damaged: modules.safetensors"),
        (command(stage, tmp_path / "full"), "exists and is no earlier export"),
        (command(stage, tmp_path / "file"), "exists and is no earlier export"),
        (command(stage, runs / "generative"), "exists and is no earlier export"),
        (command(stage, tmp_path / "absent" / "out"), "give a folder within one that exists"),
        (command(stage, tmp_path / "file" / "out"), "give a folder within one that exists"),
    ):
        assert refused(capsys, words, problem), words
        assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_proof_is_a_fault_of_the_run(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(MergeProof, "holds", False)
    capsys.readouterr()
    assert trainer.main(command(runs / "generative", tmp_path / "out")) == 3
    assert capsys.readouterr().err.count("error: ") == 1  # behind the bar of the shards
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


def test_several_processes_are_refused(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export_command, "processes", lambda: SimpleNamespace(num_processes=2))
    words = command(runs / "generative", tmp_path / "out")
    assert refused(capsys, words, "--export runs in one process")


# --------------------------------------------------------------------------- the page


def snippets(heading: str) -> list[str]:
    """The Python blocks below a heading of the page, as they stand."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    section = next(each for each in sections if each.startswith(heading))
    return re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


@pytest.fixture
def served(
    runs: Path, table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Work where the page's folders and files are; return the names that its code shares."""
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(runs)
    write_data(table.head(5).drop(columns="label_escalation"), Path("new_patients.csv"))
    assert trainer.main(command(Path("runs/generative"), Path("export"))) == 0
    return {}


def test_the_pages_code_writes_our_reports(served: dict[str, Any]) -> None:
    for code in [*snippets("The payload"), *snippets("Plain transformers")]:
        exec(code, served)
    expected = predicted(Path("runs/generative"), Path("new_patients.csv"), Path("out.csv"))
    assert served["reports"] == expected["report"].tolist()
    assert expected["prediction"].nunique() == 2


def test_the_pages_probability_is_that_of_the_run(served: dict[str, Any]) -> None:
    served["data"] = "new_patients.csv"
    (code,) = snippets("Probabilities")
    exec(code, served)
    predicted(Path("runs/classification"), Path("new_patients.csv"), Path("out.csv"))
    expected = read_predictions(Path("out.csv"))["probability"]
    np.testing.assert_allclose(served["probability"], expected, atol=1e-6)


def test_the_pages_texts_are_what_a_model_of_text_alone_reads(served: dict[str, Any]) -> None:
    (code,) = snippets("llama.cpp")
    exec(code, served)
    trained = load_trained_model(Path("export"), trainer.BUILDERS)
    assert trained.tokenizer is not None
    dataset = MIMICtrajectoryDataset("new_patients.csv", require_labels=False)
    text = TextCollator(dataset, trained.tokenizer, trained.prompts, answers=False)
    read = [trained.tokenizer.decode(ids + text.stem) for ids in text.prompt_ids]
    assert served["texts"] == [text.rstrip() for text in read]  # the verdicts share a space
    assert all(text.endswith("In-hospital death:") for text in served["texts"])
