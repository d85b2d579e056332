"""``--dry_run``, and what a run says where memory is too little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import medgemma_trainer as trainer
from language_models import patients
from medgemma_clinical.training.loaders import batches_of
from stages import STAGE_1, TINY, arguments, data_for, make_stage


@pytest.mark.parametrize("flags", [(STAGE_1,), ("--mode", "generative", *TINY)])
def test_a_dry_run_takes_two_steps_measures_and_leaves_nothing(
    flags: tuple[str, ...],
    dka_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    batches: list[list[int]] = []
    train_step = trainer.train_step

    def counted(state: Any, loss: float, terms: int) -> None:
        batches.append([state.average.steps, terms])
        train_step(state, loss, terms)

    monkeypatch.setattr(trainer, "train_step", counted)
    words = [*flags, "--dry_run", "--data_path", str(dka_file), "--batch_size", "4"]
    assert trainer.main(words) == 0
    assert [step for step, _ in batches] == [0, 1]
    printed = capsys.readouterr().out
    assert "dry run: 2 steps on the longest rows" in printed
    assert "peak memory" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [(STAGE_1,), ("--gradient_accumulation", "3")])
def test_a_dry_run_takes_the_longest_rows_and_whole_steps(flags: tuple[str, ...]) -> None:
    args = arguments(*TINY, *flags, "--batch_size", "1")
    data = data_for(args, patients())
    stage = make_stage(args, data)
    seen: list[int] = []

    def note(model: nn.Module, inputs: Any, _: Any) -> None:
        if model.training:
            seen.extend(inputs[0]["index"].tolist())

    stage.model.register_forward_hook(note)
    train = data.split["train"]
    lengths = batches_of(stage.loaders["train"]).lengths
    assert (lengths is None) == (flags == (STAGE_1,))
    lengths = data.dataset.lengths if lengths is None else lengths
    trainer.dry_run(stage, data, args)
    assert len(seen) == 2 * stage.accumulate
    longest = np.sort(lengths[train])[::-1][: len(seen)]
    assert sorted(lengths[seen], reverse=True) == longest.tolist()


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_ends_with_what_to_do(
    fault: Exception,
    dka_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any) -> None:
        raise fault

    monkeypatch.setattr(trainer, "train_epoch", full)
    words = [STAGE_1, "--data_path", str(dka_file), "--output_dir", str(tmp_path / "run")]
    assert trainer.main(words) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has too little memory" in error
    known = trainer.build_parser().format_help()
    flags = {word.strip(",.") for word in error.split() if word.startswith("--")}
    if isinstance(fault, MemoryError):
        assert "read fewer rows" in error
    else:
        assert {"--batch_size", "--gradient_accumulation", "--gradient_checkpointing"} <= flags
    assert all(flag in known for flag in flags)
