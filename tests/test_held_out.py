"""Held-out patients stay unseen by normaliser and stage 1; no figure depends on the batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import medgemma_trainer as trainer
from dataset_format import MIMICtrajectoryDataset
from dte_encoder import ClinicalODERNN
from language_models import CPU
from medgemma_clinical.commands import stages as wiring
from medgemma_clinical.evaluation import bootstrap
from medgemma_clinical.evaluation.predictions import Predictions
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.hub import share_checkpoint
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, read_trajectory
from medgemma_clinical.training.evaluate import evaluate
from stages import STAGE_1, TINY, arguments, data_for, make_stage, stage1_of
from trajectories import SERIES
from visits import cohort

TOO_LONG = "20 (0h) -> 21 (900000h)"


# --------------------------------------------------------------------------- the normaliser


def scales(table: pd.DataFrame) -> dict[str, Tensor]:
    """Return what a new stage 1 has fitted to a table: scales of values, summaries and facts."""
    args = arguments(STAGE_1)
    data = data_for(args, MIMICtrajectoryDataset(table))
    assert data.dataset.fact_names
    return dict(wiring.make_stage1(args, data, trainer.ENCODERS).named_buffers())


def test_the_normaliser_sees_the_training_part_alone() -> None:
    table = cohort()
    split = MIMICtrajectoryDataset(table).split(0)
    before = scales(table)
    assert before
    changed = table.copy()
    held_out = np.concatenate([split["val"], split["test"]])
    changed.loc[held_out, SERIES] = "900 (0h) -> -900 (5h)"
    changed.loc[held_out, "clinical_context"] = "visit 900, transferred"
    after = scales(changed)
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed.loc[split["train"][0], SERIES] = "900 (0h)"
    changed.loc[split["train"][0], "clinical_context"] = "visit 900"
    touched = scales(changed)
    moved = {name for name in before if not torch.equal(before[name], touched[name])}
    for part in ("encoder.value_mean", "summary_scaler.mean", "fact_scaler.mean"):
        assert any(part in name for name in moved), part


# --------------------------------------------------------------------------- stage 1's patients


@pytest.fixture(scope="module")
def checkpoint(dka_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a stage 1 that was trained for one epoch."""
    folder = tmp_path_factory.mktemp("stage1")
    words = [STAGE_1, "--data_path", str(dka_file), "--output_dir", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "REPLICATES", 20)
        assert trainer.main([*words, "--trajectory_epochs", "1", "--log_file", "none"]) == 0
    return folder / TRAJECTORY_FILE


@pytest.fixture
def second_stage(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Start stage 2 with stage 1's file; no language model may be loaded before it is refused."""

    def too_late(*_: Any) -> None:
        pytest.fail("minutes have gone into the language model")

    monkeypatch.setattr(wiring, "load_language_model", too_late)

    def start(data: Path, *flags: str) -> int:
        words = ["--ode_checkpoint", str(checkpoint), "--data_path", str(data), *flags]
        return trainer.main([*TINY, *words, "--output_dir", str(tmp_path / "run")])

    return start


def same_file(table: pd.DataFrame) -> pd.DataFrame:
    return table


def with_contexts(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(clinical_context=[f"note {k}" for k in range(len(table))])


def in_another_order(table: pd.DataFrame) -> pd.DataFrame:
    return table.sample(frac=1, random_state=0)


def fewer(table: pd.DataFrame) -> pd.DataFrame:
    return table.head(120)


@pytest.mark.parametrize("mode", ["classification", "generative"])
@pytest.mark.parametrize(
    ("change", "flags"),
    [
        (same_file, ("--seed", "1")),
        (same_file, ("--max_samples", "100")),
        (with_contexts, ("--seed", "1")),
        (in_another_order, ()),
        (fewer, ()),
    ],
)
def test_stage_1_may_not_have_learned_from_patients_who_are_held_out(
    change: Callable[[pd.DataFrame], pd.DataFrame],
    flags: tuple[str, ...],
    mode: str,
    second_stage: Callable[..., int],
    dka_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data.csv"
    change(pd.read_csv(dka_file)).to_csv(data, index=False)
    assert second_stage(data, "--mode", mode, *flags) == 2
    error = capsys.readouterr().err
    assert "held-out patients trained this encoder: use the same --seed and --max_samples" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_shared_copy_is_refused_on_the_data_that_trained_it(
    checkpoint: Path, dka_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The copy does not know who trained, and the split may be another: here it is the same."""
    share_checkpoint(checkpoint, tmp_path / "shared")
    copy = tmp_path / "shared" / TRAJECTORY_FILE
    words = [*TINY, "--ode_checkpoint", str(copy), "--data_path", str(dka_file)]
    assert trainer.main([*words, "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "a shared copy, trained on these very data, does not know which patients" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_shared_copy_on_other_data_is_warned_of(
    checkpoint: Path, dka_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    share_checkpoint(checkpoint, tmp_path / "shared")
    copy = tmp_path / "shared" / TRAJECTORY_FILE
    in_another_order(pd.read_csv(dka_file)).to_csv(tmp_path / "data.csv", index=False)
    args = arguments("--ode_checkpoint", str(copy), "--data_path", str(tmp_path / "data.csv"))
    assert stage1_of(args, data_for(args)) is not None
    (line,) = [each for each in caplog.messages if "shared copy" in each]
    assert "a leak cannot be found: make sure that none of them is held out here" in line


def test_an_encoder_of_another_series_is_refused(
    second_stage: Callable[..., int],
    dka_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data.csv"
    data.write_bytes(dka_file.read_bytes())
    data.with_suffix(".json").write_text('{"series": "Lactate", "unit": "mmol/L"}')
    assert second_stage(data) == 2
    assert "trained on features" in capsys.readouterr().err


def test_another_clock_than_stage_1s_is_refused(
    second_stage: Callable[..., int], dka_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert second_stage(dka_file, "--time_scale", "24") == 2
    assert "its --time_scale is 72.0: leave the flag out" in capsys.readouterr().err


def test_a_new_encoder_has_the_datas_clock_and_a_loaded_one_its_own(
    checkpoint: Path, dka_file: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.csv"
    data.write_bytes(dka_file.read_bytes())
    data.with_suffix(".json").write_text('{"time_scale": 24}')
    loaded = ["--ode_checkpoint", str(checkpoint)]
    for flags, scale in (([], 24.0), (["--time_scale", "9"], 9.0), (loaded, 72.0)):
        args = arguments("--data_path", str(data), *flags)
        stage1: Any = stage1_of(args, data_for(args))
        assert stage1.encoder.time_scale == scale


def test_a_loaded_stage_1_is_the_saved_one_and_learns_no_more(
    checkpoint: Path, dka_file: Path
) -> None:
    args = arguments("--ode_checkpoint", str(checkpoint), "--data_path", str(dka_file))
    loaded = stage1_of(args, data_for(args))
    assert loaded is not None
    saved = read_trajectory(checkpoint).weights
    state = loaded.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state.items())
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("loaded", [False, True])
def test_a_gap_that_the_encoder_cannot_hold_is_refused(
    loaded: bool, checkpoint: Path, dka_file: Path, tmp_path: Path
) -> None:
    table = pd.read_csv(dka_file)
    table.loc[0, SERIES] = TOO_LONG
    table.to_csv(tmp_path / "long.csv", index=False)
    flags = ["--ode_checkpoint", str(checkpoint)] if loaded else []
    args = arguments("--data_path", str(tmp_path / "long.csv"), *flags)
    with pytest.raises(InputError, match=r"gap of 900000 h in the data needs a larger --time_s"):
        stage1_of(args, data_for(args))


# --------------------------------------------------------------------------- batches


def scored(dka_file: Path, batch_size: int) -> Predictions:
    """Return a new stage 1's predictions of the validation part."""
    args = arguments(STAGE_1, "--data_path", str(dka_file), "--batch_size", str(batch_size))
    stage = make_stage(args, data_for(args))
    return evaluate(stage.model, stage.loaders["val"], CPU)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_no_figure_depends_on_the_batch_size(batch_size: int, dka_file: Path) -> None:
    whole, parts = scored(dka_file, 64), scored(dka_file, batch_size)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    np.testing.assert_allclose(parts.logit, whole.logit, atol=1e-5)
    assert parts.rows.tolist() == whole.rows.tolist()


def test_stage_1_plans_each_batch_once_and_ahead(
    dka_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []
    plan = ClinicalODERNN.plan

    def planning(encoder: Any, *batch: Tensor) -> Any:
        planned.append(len(batch[0]))
        return plan(encoder, *batch)

    monkeypatch.setattr(ClinicalODERNN, "plan", planning)
    args = arguments(STAGE_1, "--data_path", str(dka_file))
    stage = make_stage(args, data_for(args))
    batches = list(stage.loaders["train"])
    assert planned == [16] * 8
    for batch in batches:
        stage.model(batch)
    assert planned == [16] * 8
