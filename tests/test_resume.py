"""Runs of the whole program that are stopped and resumed: the same result, to the last bit."""

import json
import os
import random
import shutil
import signal
import stat

import faults
import numpy as np
import pandas as pd
import pytest
import torch
from faults import result_of

import medgemma_trainer as trainer
from conftest import sign_table
from language_models import TINY_MODEL
from medgemma_clinical.commands import results, run_folder
from medgemma_clinical.files import locked
from medgemma_clinical.training import memory
from medgemma_clinical.training.loaders import LengthBatches
from medgemma_clinical.training.state import read_state
from predicting import refused

pytestmark = pytest.mark.slow

NO_DROPOUT = "--dropout 0 --lora_dropout 0"
STAGES = {
    "trajectory": "--trajectory_only --trajectory_epochs 3 --members 2 --batch_size 8",
    "classification": f"--epochs 2 --batch_size 4 --gradient_accumulation 2 {NO_DROPOUT}",
    "generative": "--mode generative --epochs 1 --batch_size 8 --lora_dropout 0.3",
}
EPOCH = 4  # steps: 32 rows train, 8 at a time
STEPS = {"trajectory": 3 * EPOCH, "classification": 2 * EPOCH, "generative": EPOCH}


def marked_table():
    """Patients whose ids, contexts and values can be found wherever they turn up."""
    table = sign_table(48, seed=3).assign(split=["train"] * 32 + ["val"] * 8 + ["test"] * 8)
    table["subject_id"] = [f"MARKERID{k}" for k in range(len(table))]
    table["clinical_context"] = "MARKERCONTEXT"
    table.loc[7, "clinical_trajectory"] = "731.97319 (0.73197h) -> 24 (9h)"
    return table


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "patients.csv"
    marked_table().to_csv(path, index=False)
    return path


def command(stage, data, folder, *flags):
    model = "" if stage == "trajectory" else f"--model_name {TINY_MODEL}"
    words = f"{STAGES[stage]} {model} --data_path {data} --output_dir {folder} --log_file none"
    return [*words.split(), *flags]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A folder with a run of each stage, in a folder of its own, that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for stage in STAGES:
        assert trainer.main(command(stage, data, folder / stage)) == 0
    return folder


@pytest.fixture
def stopped(data, tmp_path):
    """The command of a run of stage 1 that was stopped in its second epoch."""
    stop(words := command("trajectory", data, tmp_path / "run"), EPOCH + 3)
    return words


def at_step(number, action, patch):
    """Call ``action`` just before so many-th step; return the list that fills with steps taken."""
    steps, iterate = [], LengthBatches.__iter__

    def counted(batches):
        for rows in iterate(batches):
            if batches.shuffle:
                steps.append(rows)
                if len(steps) == number:
                    action()
            yield rows

    patch.setattr(LengthBatches, "__iter__", counted)
    return steps


class PowerLoss(BaseException):
    """Ends a run without a chance to keep anything."""


def send(sent):
    """Return a function that sends this process a signal, or raises an exception."""

    def end(*_, **__):
        if not isinstance(sent, int):
            raise sent
        os.kill(os.getpid(), sent)

    return end


def stop(words, where, sent=signal.SIGTERM):
    """Run a command up to so many-th step, or to a function; return the steps that it kept."""
    with pytest.MonkeyPatch.context() as patch:
        steps = at_step(where, send(sent), patch)
        if not isinstance(where, int):
            patch.setattr(*where, send(sent))
        try:
            assert trainer.main(words) == 128 + sent
        except PowerLoss:  # what was done since the state before validation is lost
            del steps[(len(steps) - 1) // EPOCH * EPOCH :]
    return steps


def contents(folder):
    """Return all files but the locks, which stay."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


DRAW = random.Random(3)
ENDS = signal.SIGTERM, signal.SIGHUP, signal.SIGINT, PowerLoss
ANYWHERE = [
    (stage, DRAW.randint(1, STEPS[stage]), DRAW.choice(ENDS))
    for stage, times in (("trajectory", 4), ("classification", 2), ("generative", 1))
    for _ in range(times)
]


@pytest.mark.parametrize(
    ("stage", "where", "sent"),
    [
        *ANYWHERE,
        ("trajectory", (trainer, "validate"), signal.SIGINT),
        ("classification", (results, "write"), signal.SIGINT),
        ("trajectory", (run_folder, "finish_run"), signal.SIGINT),
    ],
)
def test_a_stopped_run_resumes_to_the_same_result(
    stage, where, sent, data, undisturbed, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    before = stop(words := command(stage, data, folder), where, sent)
    progress = read_state(run_folder.state_folder(folder / stage))["progress"]
    assert progress["steps"] == len(before)
    (folder / stage / "report.html").unlink(missing_ok=True)
    for path in (folder / stage / "history.jsonl", *folder.glob("*.pt")):
        path.write_text("damaged")  # it comes back from the state
    torch.manual_seed(len(before))  # whatever the generators hold by now
    after = at_step(0, None, monkeypatch)
    assert trainer.main([*words, "--resume"]) == 0
    assert len(before) + len(after) == STEPS[stage]
    assert result_of(folder, stage) == result_of(undisturbed / stage, stage)
    assert (folder / stage / "report.html").exists()
    assert not (folder / stage / "last").exists()
    history = (folder / stage / "history.jsonl").read_text().splitlines()
    for line in history[progress["epoch"] :][:1]:  # with what came before the stop
        assert json.loads(line)["seconds"] > progress["seconds"] > 0


def test_states_come_every_so_many_steps_and_exact_kernels_change_nothing(
    data, undisturbed, tmp_path, monkeypatch
):
    kept, on, enabled = [], [], torch.are_deterministic_algorithms_enabled
    save = trainer.write_state

    def saving(folder, state):
        kept.append(state["progress"]["steps"])
        save(folder, state)

    monkeypatch.setattr(trainer, "write_state", saving)
    at_step(1, lambda: on.append(enabled()), monkeypatch)
    words = command("trajectory", data, tmp_path, "--save_every", "3", "--deterministic")
    assert trainer.main(words) == 0
    assert kept == sorted([0, *range(3, 13, 3), *range(4, 13, 4), 12])  # validation, the end
    assert (on, enabled()) == ([True], False)
    assert result_of(tmp_path, "trajectory") == result_of(undisturbed / "trajectory", "trajectory")


def test_a_run_resumes_with_its_steps_cut_otherwise(
    data, undisturbed, tmp_path, capsys, monkeypatch
):
    """Of the same rows a step, with layers computed again from then on: the same to rounding."""
    stage, two, recomputes, check = "classification", tmp_path / "two", [], memory.check_memory

    def checked(stage, device):
        recomputes.append(stage.recomputes)
        check(stage, device)

    monkeypatch.setattr(memory, "check_memory", checked)
    stop(words := command(stage, data, two), EPOCH + 2)
    stop([*words, "--resume", "--gradient_checkpointing"], 1)
    before, words = contents(two), [*words, "--resume"]
    assert refused(capsys, [*words, "--batch_size", "8"], "--batch_size")
    assert refused(capsys, [*words, "--gradient_accumulation", "1"], "--gradient_accumulation")
    assert contents(two) == before
    assert trainer.main([*words, "--batch_size", "8", "--gradient_accumulation", "1"]) == 0
    assert recomputes == [False, True, True], "the state keeps it"
    folders = undisturbed / stage / stage, two / stage
    risks = [pd.read_csv(each / "predictions_test.csv")["probability"] for each in folders]
    np.testing.assert_allclose(*risks, atol=2e-5)
    history = [pd.read_json(each / "history.jsonl", lines=True) for each in folders]
    np.testing.assert_allclose(*(each["train_loss"] for each in history), rtol=1e-4)


def test_a_sample_of_the_fault_trials_ends_well():
    kinds = ["killed at a write", "disk full"]
    assert faults.main(["--trials", "1", "--stages", "trajectory", "--kinds", *kinds]) == 0


def test_another_command_or_other_data_are_refused_and_nothing_changes(
    stopped, data, tmp_path, capsys
):
    moved, other, slow = (shutil.copy(data, tmp_path / f"{name}.csv") for name in "abc")
    slow.with_suffix(".json").write_text('{"time_scale": 9}')
    other.write_text(data.read_text().replace("(9h)", "(9.5h)"))
    before, new, folder = contents(tmp_path / "run"), tmp_path / "new", tmp_path / "run/trajectory"
    for flags, named in (
        ("--seed 1 --resume", "--seed"),
        ("--batch_size 4 --resume", "--batch_size"),
        (f"--data_path {other} --resume", folder),
        (f"--data_path {slow} --resume", folder),
        (f"--output_dir {new} --resume", new),
        (f"--log_file {tmp_path}", "--log_file"),
    ):
        assert refused(capsys, [*stopped, *flags.split()], named)
    with locked(folder):  # another run is at work there
        for flags in ([], ["--resume"]):
            assert refused(capsys, [*stopped, *flags], folder)
    for where in ("make_stage", "run_log.log_run_summary", "memory.check_memory"):
        for sent, code in ((KeyboardInterrupt, 130), (MemoryError, 3)):  # it never began
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(f"medgemma_trainer.{where}", send(sent))
                assert refused(capsys, [*stopped, "--log_file", "auto"], code=code)
    assert contents(tmp_path / "run") == before
    assert not new.exists()
    assert trainer.main([*stopped, "--data_path", str(moved), "--resume"]) == 0


def test_a_finished_run_is_for_its_owner_alone_and_stays_as_it_is(data, undisturbed, capsys):
    before = contents(undisturbed)
    for path in undisturbed.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    for stage in STAGES:
        folder = undisturbed / stage
        assert trainer.main(command(stage, data, folder, "--resume")) == 0
        assert str(folder / stage) in capsys.readouterr().out
    assert contents(undisturbed) == before


@pytest.mark.parametrize("stage", ["trajectory", "generative"])
def test_no_patient_is_in_what_a_run_writes_or_prints(stage, data, tmp_path, capsys):
    """But for predictions and reports, which are of patients."""
    stop(words := command(stage, data, tmp_path, "--log_file", "auto"), 3)
    kept = contents(tmp_path)
    assert any("/last/" in name for name in kept)
    assert trainer.main([*words, "--resume"]) == 0
    printed = "".join(capsys.readouterr())
    assert all(piece in printed for piece in ("rows 48", "train 32", "epoch 1/"))
    assert not any(mark in printed for mark in ("MARKER", "731.97"))
    of_patients = ("predictions_val.csv", "predictions_test.csv", "_test.jsonl")
    for name, content in (kept | contents(tmp_path)).items():
        shown = any(mark in content for mark in (b"MARKER", b"731.97"))
        assert not shown or name.endswith(of_patients), name
